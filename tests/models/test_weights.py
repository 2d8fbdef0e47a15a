"""One network in many guises: whoever wrote it, it gives the same features; and what is no network is refused."""

import argparse
import json
import os
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import save_for_hf
from timm.models.vision_transformer import checkpoint_filter_fn

import gtsa
from gtsa import UserError
from gtsa.evaluation.retrieval import nearest, votes_of
from gtsa.models import published, state_dict, weights
from gtsa.models.backbone import Backbone
from gtsa.models.weight_sources import Weights, read_weights
from gtsa.models.weights import load_backbone

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SIDE, DEPTH, WIDTH = 64, 2, 192


def shaken(module, seed=0):
    """Every parameter moved, so that none is a default."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def timm_vit(seed=0, name="vit_tiny_patch16_224", **arguments):
    return shaken(timm.create_model(name, img_size=SIDE, depth=DEPTH, num_classes=0, **arguments), seed)


def hugging(vit, kind=transformers.ViTModel, eps=1e-6):
    """The same network in transformers, tensor by tensor."""
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=3,
        intermediate_size=4 * WIDTH,
        image_size=SIDE,
        layer_norm_eps=eps,
    )
    whole = kind(config).eval()
    model = getattr(whole, "vit", whole)
    with torch.no_grad():
        model.embeddings.cls_token.copy_(vit.cls_token)
        model.embeddings.position_embeddings.copy_(vit.pos_embed)
        pairs = [(model.embeddings.patch_embeddings.projection, vit.patch_embed.proj), (model.layernorm, vit.norm)]
        for reference, ours in zip(model.layers, vit.blocks, strict=True):
            pairs += [(reference.layernorm_before, ours.norm1), (reference.layernorm_after, ours.norm2)]
            pairs += [(reference.mlp.fc1, ours.mlp.fc1), (reference.mlp.fc2, ours.mlp.fc2)]
            pairs += [(reference.attention.o_proj, ours.attn.proj)]
            for i, part in enumerate("qkv"):
                linear = getattr(reference.attention, f"{part}_proj")
                linear.weight.copy_(ours.attn.qkv.weight[i * WIDTH : (i + 1) * WIDTH])
                linear.bias.copy_(ours.attn.qkv.bias[i * WIDTH : (i + 1) * WIDTH])
        for reference, ours in pairs:
            reference.weight.copy_(ours.weight)
            reference.bias.copy_(ours.bias)
    return whole


def images(count=2, side=SIDE, seed=1):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def features(backbone, pixels):
    """All tokens of the last block after its norm, [N, prefix + h * w, D]."""
    tokens = backbone.eval()(pixels)
    return torch.cat([tokens.prefix, tokens.patches.flatten(1, 2)], dim=1)


def as_timm(vit, saved):
    headed = timm.create_model("vit_tiny_patch16_224", img_size=SIDE, depth=DEPTH, num_classes=10)
    headed.load_state_dict(vit.state_dict(), strict=False)
    save_for_hf(headed, saved, safe_serialization=True)


def as_hugging(vit, saved, kind=transformers.ViTModel, **options):
    hugging(vit, kind).save_pretrained(saved, **options)
    transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(saved)


def as_dino(vit, saved):
    saved = saved.with_suffix(".pth")
    state = {f"module.backbone.{k}": v for k, v in vit.state_dict().items()}
    heads = {"module.head.mlp.0.weight": torch.zeros(4, 4), "module.head.last_layer.weight_g": torch.ones(9, 1)}
    other = {k: v + 1 for k, v in state.items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    description = {"epoch": 3, "args": argparse.Namespace(arch="vit_tiny", lr=0.1), "optimizer": optimizer}
    torch.save({"student": other, "teacher": {**state, **heads}, **description}, saved)
    return saved


def as_tensors(vit, saved):
    saved = saved.with_suffix(".safetensors")
    safetensors.torch.save_file(vit.state_dict(), saved)
    return saved


GUISES = {
    "timm": as_timm,
    "transformers 4": as_hugging,
    "transformers 5": lambda vit, saved: as_hugging(vit, saved, save_original_format=False),
    "shards": lambda vit, saved: as_hugging(vit, saved, max_shard_size="1MB"),
    "classifier": lambda vit, saved: as_hugging(vit, saved, transformers.ViTForImageClassification),
    "classifier 5": lambda v, p: as_hugging(v, p, transformers.ViTForImageClassification, save_original_format=False),
    "masked": lambda vit, saved: as_hugging(vit, saved, transformers.ViTForMaskedImageModeling),
    "dino": as_dino,
    "tensors": as_tensors,
}
LEFT = {
    "timm": "; left out: 2 of head",
    "transformers 4": "; left out: 2 of pooler",
    "transformers 5": "; left out: 2 of pooler",
    "shards": "; left out: 2 of pooler",
    "classifier": "; left out: 2 of classifier",
    "classifier 5": "; left out: 2 of classifier",
    "masked": "; left out: 2 of decoder, 1 of mask_token",
    "dino": "; left out: 2 of head, 1 of optimizer, 30 of student; taken for vit_tiny_patch16_224: 2 blocks, 3 heads, "
    "0 registers (if not, give --model); images normalised as for ImageNet",
    "tensors": "; taken for vit_tiny_patch16_224: 2 blocks, 3 heads, 0 registers (if not, give --model); images normalised as for ImageNet",
}


@pytest.fixture(scope="module")
def vit():
    return timm_vit()


@pytest.mark.parametrize("guise", GUISES)
def test_one_network_in_any_guise(tmp_path, vit, guise):
    saved = GUISES[guise](vit, tmp_path / "w") or tmp_path / "w"
    if guise == "shards":
        assert len(list(saved.glob("*.safetensors"))) > 2
    backbone, description = load_backbone(str(saved))
    whose = " (teacher)" if guise == "dino" else ""
    assert description == f"30 of 30 tensors loaded from {saved}{whose}{LEFT[guise]}"
    pixels = images(64)
    with torch.no_grad():
        wanted = vit.forward_features(pixels)
    actual = features(backbone, pixels)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
    for token in (slice(0, 1), slice(1, None)):  # CLS, mean of patches
        a, b = (torch.nn.functional.normalize(t[:, token].mean(1), dim=-1) for t in (actual, wanted))
        classes = torch.arange(32) % 4
        (ours, near), (reference, far) = (nearest(t[32:], t[:32], 10) for t in (a, b))
        assert torch.equal(near, far)
        votes = [votes_of(s, classes[near], 4, 0.07) for s in (ours, reference)]
        assert torch.equal(votes[0].argsort(1), votes[1].argsort(1))
        torch.testing.assert_close(*votes)
    if saved.is_dir() and guise != "timm":
        assert backbone.normalisation == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 48}
KINDS = {
    "vit": (transformers.ViTModel, transformers.ViTConfig, {"patch_size": 8, "intermediate_size": 100}),
    "vit without bias": (transformers.ViTModel, transformers.ViTConfig, {"intermediate_size": 256, "qkv_bias": False}),
    "vit, another eps": (transformers.ViTModel, transformers.ViTConfig, {"layer_norm_eps": 1e-3}),
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config, {"image_size": 42}),
    "dinov2 classifier": (transformers.Dinov2ForImageClassification, transformers.Dinov2Config, {"image_size": 42}),
    "registers": (transformers.Dinov2WithRegistersModel, transformers.Dinov2WithRegistersConfig, {}),
    "dinov3": (transformers.DINOv3ViTModel, transformers.DINOv3ViTConfig, {"num_register_tokens": 3, "intermediate_size": 300}),
    "dinov3 alone": (transformers.DINOv3ViTModel, transformers.DINOv3ViTConfig, {"rope_theta": 50.0}),
}  # fmt: skip


@pytest.mark.parametrize("layout", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_computes(tmp_path, kind, layout):
    model, config, options = KINDS[kind]
    torch.manual_seed(0)
    whole = shaken(model(config(**{**SMALL, **options})))
    inner = getattr(whole, "dinov2", whole)
    if kind.startswith("vit"):
        with torch.no_grad():  # tokens of little variance, so that eps counts
            for name in ("cls_token", "position_embeddings"):
                getattr(inner.embeddings, name).mul_(1e-2)
            inner.embeddings.patch_embeddings.projection.weight.mul_(1e-2)
            inner.embeddings.patch_embeddings.projection.bias.mul_(1e-2)
    whole.save_pretrained(tmp_path, save_original_format=layout)
    side = {**SMALL, **options}["image_size"]
    backbone, description = load_backbone(str(tmp_path))
    with torch.no_grad():
        wanted = inner(images(side=side)).last_hidden_state
    actual = features(backbone, images(side=side))
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
    assert "no preprocessor_config.json" in description
    if kind == "vit":
        for norm in weights.norms(backbone):
            norm.eps = 1e-6
        assert (features(backbone, images(side=side)) - wanted).abs().max() > 1e-4  # the test can tell


def test_a_config_may_leave_out_what_transformers_knows(tmp_path, vit):
    as_hugging(vit, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("qkv_bias", "hidden_act", "patch_size", "num_channels"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(
        features(load_backbone(str(tmp_path))[0], images()), vit.forward_features(images()), atol=1e-5, rtol=0
    )


def test_half_precision_is_read_as_it_is(tmp_path):
    whole = shaken(transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**SMALL)))
    whole.bfloat16().save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = whole.float()(images(side=48)).last_hidden_state
    torch.testing.assert_close(features(load_backbone(str(tmp_path))[0], images(side=48)), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))),
        ({"do_normalize": False}, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))),
        ({"rescale_factor": 1 / 127.5}, "pixels are not scaled to"),
        ({"do_rescale": False}, "pixels are not scaled to"),
        ({"image_std": [1, 1]}, "are not of three channels"),
    ],
)
def test_preprocessors(tmp_path, vit, change, wanted):
    hugging(vit).save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if isinstance(wanted, str):
        refused(tmp_path, wanted)
    else:
        assert load_backbone(str(tmp_path))[0].normalisation == wanted


def test_timm_by_name(monkeypatch):
    """At the size that the weights were made for, not at 224; the hub is a stand-in."""
    create, made = timm.create_model, []

    def fetched(name, pretrained=False, **arguments):
        made.append(shaken(create(name, **arguments)))
        return made[-1]

    monkeypatch.setattr(timm, "create_model", fetched)
    monkeypatch.setattr(published, "check_reachable", lambda spec: None)
    actual = read_weights("timm:vit_tiny_patch16_384")
    monkeypatch.undo()
    assert (actual.model, actual.arguments) == ("vit_tiny_patch16_384", {"img_size": 384})
    assert actual.normalisation == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert all(torch.equal(actual.tensors[k], v) for k, v in made[0].state_dict().items())
    with pytest.raises(UserError, match="timm:no_such_vit could not be fetched") as caught:
        read_weights("timm:no_such_vit")
    assert caught.value.code == 4


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    """One clean line at once: the client of the hub would try for a minute."""
    asked = []

    def refuse(url, **options):
        asked.append(url)
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr(published, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(published, "try_to_load_from_cache", lambda *names, **options: None)
    with pytest.raises(UserError) as caught:
        read_weights("timm:vit_small_patch14_dinov2.lvd142m")
    assert caught.value.code == 4 and len(asked) == 1
    assert str(caught.value) == (
        "timm:vit_small_patch14_dinov2.lvd142m could not be fetched: https://huggingface.co cannot be reached "
        "([Errno -2] Name or service not known); give a file or a folder of weights, or fetch "
        "these once with network: HF_HUB_OFFLINE=1 then opens them from the cache"
    )


def test_hf_hub_offline_is_named(tmp_path):
    """In a process of its own: the hub's client reads the variable when it is imported."""
    code = "from gtsa.models.published import fetch\nfetch('timm:vit_small_patch14_dinov2.lvd142m')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "is not in the cache of the hub, and HF_HUB_OFFLINE forbids to fetch it" in done.stderr.splitlines()[-1]


# Bare files


def test_teacher_or_student(tmp_path, vit):
    other = timm_vit(seed=5)
    both = {"teacher": vit.state_dict(), "student": other.state_dict()}
    flat = {f"{who}.backbone.{k}": v for who, state in both.items() for k, v in state.items()}
    flat |= {
        "teacher.dino_head.mlp.0.weight": torch.zeros(2),
        "student.ibot_head.x": torch.zeros(2),
        "dino_loss.center": torch.zeros(1, 9),
    }
    nested = {who: {"backbone": state, "dino_head": {"w": torch.zeros(2)}} for who, state in both.items()}
    for name, content in {"dicts": both, "flat": flat, "lightning": {"state_dict": flat}, "nested": nested}.items():
        torch.save(content, tmp_path / f"{name}.pth")
        for who, wanted in (("teacher", vit), ("student", other)):
            actual = read_weights(str(tmp_path / f"{name}.pth"), who)
            assert all(torch.equal(actual.tensors[k], v) for k, v in wanted.state_dict().items()), name
            assert len(actual.tensors) == 30
            if name != "dicts":
                assert sum(actual.left.values()) == (33 if name != "nested" else 32)
    torch.save({"teacher": vit.state_dict()}, tmp_path / "teacher.pth")
    with pytest.raises(UserError, match="holds a teacher and no student"):
        read_weights(str(tmp_path / "teacher.pth"), "student")
    torch.save({"student": vit.state_dict()}, tmp_path / "student.pth")
    assert "student.pth (student)" in load_backbone(str(tmp_path / "student.pth"))[1]


@given(prefix=st.lists(st.sampled_from(["module.", "backbone.", "teacher.", "encoder.", "vit.", "_orig_mod."]), max_size=4),
       boxes=st.lists(st.sampled_from(["teacher", "model", "state_dict", "module"]), max_size=3, unique=True))  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_prefixes_and_boxes_in_any_order(tmp_path_factory, prefix, boxes):
    state = STATE
    content = {"".join(prefix) + k: v for k, v in state.items()}
    for box in boxes:
        content = {box: content, "epoch": 3}
    path = tmp_path_factory.mktemp("boxes") / "w.pt"
    torch.save(content, path)
    actual = read_weights(str(path))
    assert actual.tensors.keys() == state.keys()
    assert actual.left == {}


STATE = timm.create_model("vit_tiny_patch16_224", img_size=16, depth=1, num_classes=0).state_dict()

GUESSED = [
    ("vit_tiny_patch16_224", {}),
    ("vit_small_patch8_224", {}),
    ("vit_base_patch16_224", {"depth": 1}),
    ("vit_large_patch14_224", {"depth": 1, "img_size": 42}),
    ("vit_small_patch14_dinov2", {"img_size": 42}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    ("vit_tiny_patch16_224", {"no_embed_class": True}),
    ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    ("vit_tiny_patch16_224", {"qkv_bias": False, "mlp_ratio": 3.3}),
]


@pytest.mark.parametrize(("name", "options"), GUESSED)
def test_plain_vits_are_recognised_by_their_tensors(tmp_path, name, options):
    arguments = {"depth": DEPTH, "img_size": SIDE, **options}
    model = shaken(timm.create_model(name, num_classes=0, **arguments))
    saved = as_tensors(model, tmp_path / "w")
    pixels = images(1, arguments["img_size"])
    actual = features(load_backbone(str(saved))[0], pixels)
    with torch.no_grad():
        torch.testing.assert_close(actual, model.forward_features(pixels), rtol=0, atol=1e-5)


def test_any_width_of_an_mlp_is_recognised():
    assert all(int(w * state_dict.ratio(h, w)) == h for w in (98, 192, 500, 768, 1024) for h in range(1, 5 * w))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vit_tiny_patch16_224", {"embed_dim": 200, "num_heads": 4}, "200 wide"),
        ("vit_tiny_patch16_224", {"patch_size": 32}, "patches of 32 px"),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 42}, "position embeddings"),  # 9 = 3 x 3 = 2 x 2 + 5
        ("vit_tiny_patch16_224", {"qk_norm": True}, "attn.k_norm.bias is in no plain ViT"),
        ("vit_tiny_patch16_224", {"in_chans": 4}, "4 channels"),
        ("vit_small_patch16_dinov3", {}, "is in no plain ViT"),
        ("vit_base_patch16_clip_224", {"depth": 1}, "norm_pre.bias is in no plain ViT"),
    ],
)
def test_other_models_need_their_name(tmp_path, name, options, words):
    arguments = {"depth": DEPTH, "img_size": SIDE, **options}
    saved = as_tensors(timm.create_model(name, num_classes=0, **arguments), tmp_path / "w")
    with pytest.raises(UserError, match=f"does not say which model it is .*{words}.*--model") as caught:
        load_backbone(str(saved))
    assert caught.value.code == 4


def test_the_model_by_its_name(tmp_path):
    model = shaken(timm.create_model("vit_small_patch16_dinov3", num_classes=0), seed=3)
    saved = as_tensors(model, tmp_path / "w")
    backbone, description = load_backbone(str(saved), model="vit_small_patch16_dinov3")
    with torch.no_grad():
        torch.testing.assert_close(features(backbone, images(1)), model.forward_features(images(1)), rtol=0, atol=1e-5)
    assert "taken for" not in description
    part = as_tensors(timm_vit(), tmp_path / "part")
    with pytest.raises(UserError, match=r"30 of 150 tensors fit; blocks.2.norm1.weight is missing.* and 117 more"):
        load_backbone(str(part), model="vit_tiny_patch16_224")  # half a network, by its full name


def test_dinov2_as_its_authors_write_it(tmp_path):
    """Registers without positions, a mask token and blocks in chunks; the oracle is timm's own converter."""
    model = timm_vit(name="vit_small_patch14_reg4_dinov2", patch_size=16)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.randn(1, 17, 384, generator=generator)
    state["mask_token"] = torch.zeros(1, 384)
    wanted = checkpoint_filter_fn(dict(state), model)
    model.load_state_dict(wanted)
    chunked = {k.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): v for k, v in state.items()}
    for content in (state, chunked):
        torch.save({"teacher": {f"backbone.{k}": v for k, v in content.items()}}, tmp_path / "w.pth")
        backbone, description = load_backbone(str(tmp_path / "w.pth"))
        assert "left out: 1 of mask_token" in description
        with torch.no_grad():
            torch.testing.assert_close(
                features(backbone, images()), model.forward_features(images()), rtol=0, atol=1e-5
            )


def test_a_masked_autoencoder(tmp_path, vit):
    parts = {
        "decoder_embed.weight": torch.zeros(2, 2),
        "decoder_blocks.0.norm1.weight": torch.zeros(2),
        "mask_token": torch.zeros(1, 1, 2),
    }
    torch.save({"model": {**vit.state_dict(), **parts}, "epoch": 3}, tmp_path / "w.pth")
    assert "30 of 30" in (description := load_backbone(str(tmp_path / "w.pth"))[1])
    assert "left out: 2 of decoder, 1 of mask_token" in description


# Other sizes


def test_other_sizes_are_resampled_by_timm(tmp_path, vit):
    saved = as_tensors(vit, tmp_path / "w")
    other = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=DEPTH, num_classes=0).eval()
    other.load_state_dict(checkpoint_filter_fn(vit.state_dict(), other))
    backbone = load_backbone(str(saved))[0]
    assert backbone.arguments["img_size"] == SIDE
    with torch.no_grad():
        torch.testing.assert_close(
            features(backbone, images(1, 96)), other.forward_features(images(1, 96)), rtol=0, atol=1e-5
        )
    target = Backbone("vit_tiny_patch16_224", 96, arguments={"depth": DEPTH})
    weights.load(read_weights(str(saved)), target)
    torch.testing.assert_close(target.vit.pos_embed, other.pos_embed)


def test_positions_of_another_grid(tmp_path):
    big = Backbone("vit_tiny_patch16_224", 224, arguments={"depth": 1})
    small = Backbone("vit_tiny_patch16_224", 112, arguments={"depth": 1})
    weights.load(Weights(big.vit.state_dict(), "big"), small)
    wanted = timm.layers.resample_abs_pos_embed(big.vit.pos_embed, [7, 7], [14, 14])
    torch.testing.assert_close(small.vit.pos_embed, wanted)


def test_another_eps_is_reported(tmp_path, vit):
    hugging(vit, eps=1e-12).save_pretrained(tmp_path)
    target = Backbone("vit_tiny_patch16_224", SIDE, arguments={"depth": DEPTH})
    assert weights.load(read_weights(str(tmp_path)), target).endswith(
        "; LayerNorm eps is 1e-12 in the weights and 1e-06 here"
    )


# What is refused


def refused(path, words, code=4, model=None):
    with pytest.raises(UserError, match=words) as caught:
        load_backbone(str(path), model=model)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("norm.weight"), "29 of 30 tensors fit; norm.weight is missing"),
        (lambda s: s.update({"extra.weight": torch.ones(3)}), "extra.weight has no place"),
        (lambda s: s.update({"norm.weight": torch.ones(7)}), "norm.weight is 7, 192 is needed"),
        (lambda s: s.update({"norm.weight": torch.full((192,), float("nan"))}), "norm.weight holds NaN"),
        (lambda s: s.update({"norm.weight": torch.full((192,), float("inf"))}), "norm.weight holds NaN or infinite"),
        (lambda s: s.update({"backbone.norm.weight": torch.ones(192)}), "holds norm.weight twice"),
        (lambda s: s.update({"reg_token": torch.ones(3)}), "holds no vision transformer"),
        (lambda s: s.update({"blocks.0.mlp.fc1.weight": torch.tensor(1.0)}), "holds no vision transformer"),
        (lambda s: s.update({"mean": torch.zeros(3), "std": torch.zeros(3)}), "not of three channels"),
        (lambda s: s.update({"mean": torch.zeros(()), "std": torch.ones(3)}), "holds no vision transformer"),
        (lambda s: s.clear(), "holds no dictionary of tensors"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, vit, change, words):
    state = dict(vit.state_dict())
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=words) as caught:
        target = Backbone("vit_tiny_patch16_224", SIDE, arguments={"depth": DEPTH})
        weights.load(read_weights(str(tmp_path / "w.pth")), target)
    assert caught.value.code == 4


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    "box", [lambda evil: {"model": evil}, lambda evil: evil, lambda evil: {"args": argparse.Namespace(x=evil)}]
)
def test_a_malicious_pickle_is_not_run(tmp_path, box):
    torch.save(box(Evil(tmp_path / "proof")), tmp_path / "w.pth")
    refused(tmp_path / "w.pth", r"and nothing in it was run \(it holds _?io\.open, which is no tensor\); get it again")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty or cut short"),
        (b"words", "it holds more than tensors, or is damaged"),
        (pickle.dumps({"a": 1}), "holds no dictionary of tensors|it holds more than tensors, or is damaged"),
    ],
)
def test_torchs_advice_to_run_what_is_in_a_file_is_not_passed_on(tmp_path, data, words):
    (tmp_path / "w.pth").write_bytes(data)
    refused(tmp_path / "w.pth", rf"^(?!.*weights_only).*({words})")


def test_a_dictionary_that_holds_itself(tmp_path):
    loop = {}
    loop |= {"model": loop, "optimizer": loop}
    torch.save(loop, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "holds no dictionary of tensors")


@pytest.mark.parametrize("cut", [0, 7, 2000, -1])
@pytest.mark.parametrize("guise", ["dino", "tensors", "transformers 4"])
def test_truncated_files(tmp_path, vit, guise, cut):
    saved = GUISES[guise](vit, tmp_path / "w") or tmp_path / "w"
    file = saved / "model.safetensors" if saved.is_dir() else saved
    file.write_bytes(file.read_bytes()[:cut])
    refused(saved, "cannot be read as weights")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "a\\b"])
def test_shards_outside_their_folder(tmp_path, vit, name):
    folder = tmp_path / "w"
    as_hugging(vit, folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"layernorm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "points out of its folder", 8)


def test_shards_that_do_not_agree_with_their_index(tmp_path, vit):
    as_hugging(vit, tmp_path, max_shard_size="1MB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["layernorm.weight"]
    path.write_text(json.dumps(index))
    refused(tmp_path, "do not agree about layernorm.weight")
    min(tmp_path.glob("*.safetensors")).unlink()
    refused(tmp_path, "no such file")


CONFIGS = [
    ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not gelu: a plain ViT of timm cannot hold it"),
    ({"hidden_act": "quick_gelu"}, "is not gelu"),
    ({"model_type": "swin"}, "model_type 'swin' cannot be read; vit, dinov2"),
    ({"image_size": [64, 128]}, "image_size .* is no square"),
    ({"num_channels": 1}, "it sees 1 channels"),
    ({"num_hidden_layers": 10**9}, "states 1000000000 blocks of width 192, the tensors have 2 of 192"),
    ({"hidden_size": 10**9}, "states 2 blocks of width 1000000000"),
    ({"hidden_size": "wide"}, "cannot be understood"),
    ({"num_attention_heads": 0}, "cannot be understood"),
    ({"patch_size": 0}, "is no square in px"),
    ({"patch_size": 8}, "patch_embed.proj.weight is 192x3x16x16, 192x3x8x8 is needed"),
    ({"intermediate_size": 100}, "mlp.fc1.weight is 768x192, 100x192 is needed"),
    ({"qkv_bias": False}, "attn.qkv.bias has no place"),
    ({"use_swiglu_ffn": True}, "gated"),
    ({"head_dim": 32}, "heads are of another width"),
]


@pytest.mark.parametrize(("change", "words"), CONFIGS)
def test_configs_that_are_not_supported_are_refused(tmp_path, vit, change, words):
    as_hugging(vit, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(tmp_path, words)


def test_a_tensor_that_transformers_does_not_have(tmp_path, vit):
    as_hugging(vit, tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    safetensors.torch.save_file({**state, "embeddings.stranger": torch.ones(1)}, tmp_path / "model.safetensors")
    refused(tmp_path, "30 of 30 tensors fit; embeddings.stranger has no place")
    state.pop("encoder.layer.1.attention.attention.key.weight")
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    refused(tmp_path, r"blocks.1.attn.k.weight")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_args": {"checkpoint_path": "/tmp/evil.pth"}}, "model_args checkpoint_path, which is no argument"),
        ({"model_args": {"pretrained": True}}, "model_args pretrained, which is no argument"),
        ({"architecture": "hf_hub:someone/evil"}, "no model 'hf_hub:someone/evil'"),
        ({"model_args": {"img_size": [64, 32]}}, "is no export"),
        ({"model_args": {"num_heads": 0}}, "timm makes no"),
        ({"model_args": {"act_layer": "os.system"}}, "timm makes no|cannot be used"),
        ({"model_args": {"norm_layer": "os.system"}}, "timm makes no|cannot be used"),
        ({"pretrained_cfg": {"mean": ["x"], "std": [1]}}, "is no export"),
        ({"pretrained_cfg": {"mean": [0, 0, 0], "std": [1, 1, 0]}}, "not of three channels"),
    ],
)
def test_timm_folders_that_reach_further(tmp_path, vit, change, words):
    as_timm(vit, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=words) as caught:
        load_backbone(str(tmp_path))
    assert caught.value.code in (2, 4)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "{" * 100_000, '{"architecture": 3}', '{"model_type": []}', "\xff"]
)
def test_paths_that_are_not_folders(tmp_path, vit, content):
    as_timm(vit, tmp_path)
    (tmp_path / "config.json").write_text(content, "latin-1")
    with pytest.raises(UserError) as caught:
        load_backbone(str(tmp_path))
    assert caught.value.code in (2, 4)


def test_nothing_there(tmp_path):
    refused(tmp_path, "no weights there; give a run")
    refused(tmp_path / "none.pth", "no weights there")
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    refused(tmp_path, "no such file")


def test_tensors_of_hugging_face_without_their_config(tmp_path, vit):
    as_hugging(vit, tmp_path)
    refused(tmp_path / "model.safetensors", "is of Hugging Face: give the folder")


def test_random_is_a_control():
    backbone, description = load_backbone("random:vit_tiny_patch16_224")
    assert description == "150 of 150 tensors loaded from random:vit_tiny_patch16_224"
    assert backbone.model == "vit_tiny_patch16_224"


@pytest.mark.parametrize("weights", [3, None, b"runs/mine", ""])
@pytest.mark.parametrize(
    "verb",
    [
        gtsa.load,
        lambda weights: gtsa.embed(weights, "data", "x.npy"),
        lambda weights: gtsa.explore(weights, "data"),
        lambda weights: (
            gtsa.explore("random:test_vit", "data", against=weights) if weights is not None else gtsa.load(3)
        ),
        lambda weights: gtsa.evaluate(weights, "health", val="data"),
        lambda weights: gtsa.export(weights, "out"),
    ],
)
def test_what_is_no_path_is_refused_with_what_is_accepted(verb, weights):
    with pytest.raises(
        UserError, match="names no weights; give the path of a run, an export or a file of weights"
    ) as e:
        verb(weights)
    assert e.value.code == 2
