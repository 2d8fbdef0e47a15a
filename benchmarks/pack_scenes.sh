#!/usr/bin/env bash
# Packs the code and the unlabelled images of the testbed T1 (recipes/scenes) for a machine of its own with a GPU.
#
#     benchmarks/pack_scenes.sh DATA OUT.tar       # DATA: the data set `scenes`
#
# There:
#     tar -xf OUT.tar && cd gtsa-scenes && SCENES=. benchmarks/gpu_queue.sh
#
# The code is that of HEAD: what is not committed is not packed. Labels stay here: training needs none.
set -euo pipefail
DATA=$(realpath "$1") OUT=$(realpath -m "$2") MOST=$((64 * 1024 * 1024))
cd "$(dirname "$0")/.."
if [ -n "$(git status --porcelain -- src recipes tests benchmarks pyproject.toml)" ]; then
  echo "commit first: there are changes that would not be packed" >&2
  exit 1
fi
mkdir -p "$(dirname "$OUT")"
git archive --format tar --prefix gtsa-scenes/ --output "$OUT" HEAD \
  src recipes tests benchmarks/gpu_queue.sh benchmarks/*.py benchmarks/results/gpu pyproject.toml README.md LICENSE
if [ -d benchmarks/results/scenes ]; then  # which networks are done
  git ls-files 'benchmarks/results/scenes/*.json' | tar -rf "$OUT" --transform 's,^,gtsa-scenes/,' -T -
fi
tar -rf "$OUT" --transform 's,^,gtsa-scenes/,' -C "$DATA" unlabelled/scenes unlabelled/aerial
BYTES=$(stat -c %s "$OUT")
echo "$OUT: $BYTES bytes, HEAD is $(git rev-parse --short HEAD)"
if [ "$BYTES" -gt "$MOST" ]; then
  echo "that is more than $MOST bytes" >&2
  exit 1
fi
