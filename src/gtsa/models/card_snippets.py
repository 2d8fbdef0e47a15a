"""The code in a model card that opens each export."""

from __future__ import annotations

from gtsa.models.backbone import Backbone
from gtsa.models.formats import Format

TIMM = """import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open("photo.jpg").convert("RGB"))[None]
with torch.no_grad():
    vector = model(image)  # [1, {dim}]
    patches = model.forward_features(image)[:, {prefix}:]  # [1, rows * columns, {dim}]
"""

HF = """import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTModel

processor = AutoImageProcessor.from_pretrained(".")
model = ViTModel.from_pretrained(".", add_pooling_layer=False).eval()
image = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")
with torch.no_grad():
    tokens = model(**image).last_hidden_state
patches = tokens[:, {prefix}:]  # [1, rows * columns, {dim}]
vector = {vector}  # [1, {dim}]
"""

DINO = """import timm
import torch
from PIL import Image

saved = torch.load("{file}", weights_only=True)
model = timm.create_model("{model}", num_classes=0, global_pool="", **{arguments}).eval()
model.load_state_dict({{name.removeprefix("backbone."): value for name, value in saved["teacher"].items()}})
transform = timm.data.create_transform(
    {size}, interpolation="bilinear", crop_pct=1.0, mean=saved["mean"].tolist(), std=saved["std"].tolist()
)
with torch.no_grad():
    tokens = model(transform(Image.open("photo.jpg").convert("RGB"))[None])
patches = tokens[:, {prefix}:]  # [1, rows * columns, {dim}]
vector = {vector}  # [1, {dim}]
"""

ONNX = """import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])
image = Image.open("photo.jpg").convert("RGB")  # short side resized, centre cut; any multiples of {patch} px work
image = image.resize([{size} * side // min(image.size) for side in image.size], Image.Resampling.BILINEAR)
left, top = (round((side - {size}) / 2) for side in image.size)
image = image.crop((left, top, left + {size}, top + {size}))
pixels = (np.asarray(image) / 255 - {mean}) / {std}
images = pixels.transpose(2, 0, 1)[None].astype(np.float32)
patches, vector = session.run(["patch_tokens", "pooled"], {{"images": images}})  # [1, rows, columns, {dim}], [1, {dim}]
"""

SNIPPETS = {"timm": TIMM, "hf": HF, "dino": DINO, "onnx": ONNX}


def snippet(backbone: Backbone, to: Format, file: str) -> str:
    """Python that opens an export beside itself and computes the features of ``photo.jpg``."""
    mean, std = backbone.normalisation
    return SNIPPETS[to].format(
        file=file,
        model=backbone.model.split(".")[0],
        arguments=backbone.arguments,
        size=backbone.arguments["img_size"],
        patch=backbone.patch_size,
        dim=backbone.embed_dim,
        prefix=backbone.num_prefix_tokens,
        vector="tokens[:, 0]" if backbone.pooling == "cls" else "patches.mean(1)",
        mean=list(mean),
        std=list(std),
    )
