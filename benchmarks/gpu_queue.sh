#!/usr/bin/env bash
# What waits for a GPU, in the order of its worth. Takes at most nine minutes.
#
#     OUT=runs/gpu benchmarks/gpu_queue.sh          # python3 is the Python that has gtsa; PYTHON names another
#
# Every job is bounded in time and writes OUT/NAME.json when it ends. A job whose result is kept as
# benchmarks/results/gpu/NAME.json is left out, so a second call does what is still missing. OUT/logs.tgz holds what was
# printed, tables and traces. BATCH, MODEL and PRECISION shrink the jobs for a try on a CPU.
#
# Then the networks of the testbed T1 (recipes/scenes) are trained, row by row, JOBS at a time, if SCENES names a folder with
# unlabelled/scenes and unlabelled/aerial (benchmarks/pack_scenes.sh). Each becomes OUT/scenes_ROW_SEED.tgz: log and EMA teacher
# in half precision, for `python benchmarks/scenes.py unpack`. Those in benchmarks/results/scenes are left out. One that did not
# end in time resumes in runs/scenes on the same machine. SCENES_ONLY=1 leaves the
# other jobs out. SCENES_CONFIG (e.g. recipes/scenes/cpu.yaml) shrinks the networks for a try.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
PYTHON=${PYTHON:-python3}
BATCH=${BATCH:-128}
MODEL=${MODEL:-vit_small_patch16_224}
PRECISION=${PRECISION:-bf16}
KEPT=benchmarks/results/gpu
LOGS=$(mktemp -d)
END=$((SECONDS + ${LIMIT:-540}))
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1

job() { # NAME SECONDS COMMAND...: the command writes $RESULT
  local name=$1 most=$2 left=$((END - SECONDS)) began=$SECONDS code
  shift 2
  if [ -e "$KEPT/$name.json" ]; then echo "$name: done before"; return; fi
  if [ "$left" -lt 20 ]; then echo "$name: no time left"; return; fi
  RESULT=$OUT/$name.json timeout --signal INT --kill-after 10 "$((most < left ? most : left))" "$@" >"$LOGS/$name.log" 2>&1
  code=$?
  echo "$name: code $code, $((SECONDS - began)) s"
  tail -n 3 "$LOGS/$name.log"
  tar -czf "$OUT/logs.tgz" -C "$LOGS" .
}

step() { # NAME SECONDS ARGUMENTS...
  local name=$1 most=$2
  shift 2
  job "$name" "$most" "$PYTHON" benchmarks/step.py --model "$MODEL" --precision "$PRECISION" --batch "$BATCH" \
    --json "$OUT/$name.json" "$@"
}

tests() { # a result that says which tests failed
  job test_gpu 200 bash -c "$PYTHON -m pytest tests/training/test_gpu.py tests/golden -n ${PROCESSES:-8} -v -p no:cacheprovider \
    -p no:benchmark     --junitxml $LOGS/test_gpu.xml; $PYTHON benchmarks/junit_to_json.py $LOGS/test_gpu.xml > \$RESULT"
}

# The step as it is now (results of the code before are named step_*.json).
if [ -z "${SCENES_ONLY:-}" ]; then
  step packed_profile 90 --repeats 10 --profile "$LOGS/packed.txt"
  step packed_compiled 150 --repeats 10 --compile --profile "$LOGS/compiled.txt"
  tests
  step packed_compiled_channels_last 100 --repeats 10 --compile --channels-last
  step packed_checkpointed 60 --repeats 10 --activation-checkpointing
  BATCH=$((2 * BATCH)) step packed_compiled_256 100 --repeats 10 --compile
fi

# The testbed T1: the two methods first, then GTSA against itself, then its repairs and the rivals.
ROWS=(gtsa dino gtsa-again gtsa-cls-rotation gtsa-centred gtsa-infonce gtsa-sigreg gtsa-prototypes gtsa-image gtsa-rotation-0.1
  gtsa-rotation-decay lejepa paka ibot mae)
SEEDS=(0 1 2)

row() { # NAME: trains the networks of a row that are not done, and packs those that are trained
  local row=$1 left=$((END - SECONDS)) began=$SECONDS seed cell cells=()
  for seed in "${SEEDS[@]}"; do
    cell=$row/images-$seed
    ls benchmarks/results/scenes/cells/"$cell"/*.json >/dev/null 2>&1 || cells+=("$cell")
  done
  if [ "${#cells[@]}" -eq 0 ]; then echo "$row: done before"; return; fi
  if [ "$left" -lt "${SCENES_LEAST:-120}" ]; then echo "$row: no time left"; return; fi
  timeout --signal INT --kill-after 20 "$left" "$PYTHON" -m gtsa compare --config recipes/scenes/compare.yaml \
    --config recipes/scenes/repairs.yaml ${SCENES_CONFIG:+--config "$SCENES_CONFIG"} --data "$SCENES/unlabelled" --out runs/scenes \
    --only training --jobs "${JOBS:-3}" --cells "${cells[@]}" >"$LOGS/scenes_$row.log" 2>&1
  echo "$row: code $?, $((SECONDS - began)) s"
  tail -n 3 "$LOGS/scenes_$row.log"
  for cell in "${cells[@]}"; do pack "$cell"; done
  tar -czf "$OUT/logs.tgz" -C "$LOGS" .
}

pack() { # ROW/images-SEED
  local cells=runs/scenes/cells archive=$OUT/scenes_${1%/*}_${1##*-}.tgz
  if [ -e "$cells/$1/trained.json" ]; then
    (cd $cells && tar -czf - "$1"/{trained.json,teacher,log.txt,run/config.yaml,run/*.jsonl,run/train.log}) >"$archive"
    echo "$archive: $(stat -c %s "$archive") bytes"
  elif [ -e "$cells/$1/log.txt" ]; then
    cp "$cells/$1/log.txt" "$LOGS/scenes_${1//\//_}.log"
  fi
}

if [ -n "${SCENES:-}" ]; then
  for name in "${ROWS[@]}"; do row "$name"; done
fi
tar -czf "$OUT/logs.tgz" -C "$LOGS" .
