"""Records the logits of PyTorch's networks: python tests/make_parity_record.py

It takes torch, torchvision, timm and transformers. Each network gets random weights that its
tensors' names tell, is written to a file, by `save_pretrained` where it has that, and computes in
float64. A record holds config.json, names and shapes as they stand in the file, and the logits;
not the weights, which the test makes anew. One directory is kept as it was written.
"""

import dataclasses
import json
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REFERENCE = Path(__file__).parent / 'reference'
KEPT = REFERENCE / 'hf_vit'


@dataclasses.dataclass(frozen=True)
class Case:
  """A network of theirs, and what it is here.

  Attributes:
    build: makes it.
    family: our class.
    fields: of it, which the file does not tell.
    side: of the images.
  """

  build: Callable[[], Any]
  family: str
  fields: dict[str, Any]
  side: int


def _hugging_face(name, head='ForImageClassification', **settings):
  def build():
    import transformers

    config = getattr(transformers, f'{name}Config')(num_labels=5, **settings)
    return getattr(transformers, name + head)(config)

  return build


def _torchvision(name, **settings):
  def build():
    import torchvision

    return getattr(torchvision.models, name)(num_classes=5, **settings)

  return build


def _timm(name, **settings):
  def build():
    import timm

    return timm.create_model(name, num_classes=5, **settings)

  return build


_HF_VIT = {
  'hidden_size': 16,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'intermediate_size': 64,
  'patch_size': 4,
  'image_size': 12,
}
_HF_SWIN = {
  'image_size': 40,
  'patch_size': 2,
  'window_size': 4,
  'embed_dim': 8,
  'depths': [2, 2, 1],
  'num_heads': [2, 2, 4],
}
_HF_RESNET18 = {
  'embedding_size': 8,
  'hidden_sizes': [8, 16, 32, 64],
  'depths': [2, 2, 2, 2],
  'layer_type': 'basic',
}
_HF_RESNET50 = {
  'embedding_size': 4,
  'hidden_sizes': [16, 32, 64, 128],
  'depths': [3, 4, 6, 3],
  'layer_type': 'bottleneck',
}
_TIMM_VIT = {'embed_dim': 16, 'depth': 2, 'num_heads': 2, 'patch_size': 4, 'img_size': 12}
_TIMM_SWIN = {
  'img_size': 40,
  'patch_size': 2,
  'embed_dim': 8,
  'depths': (2, 2, 1),
  'num_heads': (2, 2, 4),
  'window_size': 4,
}
_TORCHVISION_VIT = {
  'image_size': 12,
  'patch_size': 4,
  'num_layers': 2,
  'num_heads': 2,
  'hidden_dim': 16,
  'mlp_dim': 64,
}
_TORCHVISION_SWIN = {
  'patch_size': [2, 2],
  'embed_dim': 8,
  'depths': [2, 2, 1],
  'num_heads': [2, 2, 4],
  'window_size': [4, 4],
}
_VIT = {'patch': 4, 'width': 16, 'depth': 2, 'heads': 2}
_DEIT = {**_VIT, 'distilled': True}
_SWIN = {'patch': 2, 'width': 8, 'depths': (2, 2, 1), 'heads': (2, 2, 4), 'window': 4}
_TEACHER = 'ForImageClassificationWithTeacher'

CASES = {
  'hf_vit': Case(_hugging_face('ViT', **_HF_VIT), 'ViT', _VIT, 12),
  'hf_deit': Case(_hugging_face('DeiT', _TEACHER, **_HF_VIT), 'ViT', _DEIT, 12),
  'hf_swin': Case(_hugging_face('Swin', **_HF_SWIN), 'Swin', _SWIN, 40),
  'hf_resnet18': Case(
    _hugging_face('ResNet', **_HF_RESNET18), 'ResNet', {'depth': 18, 'width': 8}, 40
  ),
  'hf_resnet50': Case(
    _hugging_face('ResNet', **_HF_RESNET50), 'ResNet', {'depth': 50, 'width': 4}, 40
  ),
  'hf_mobilenetv2': Case(_hugging_face('MobileNetV2'), 'MobileNetV2', {}, 40),
  'hf_mobilenetv2_torch': Case(
    _hugging_face('MobileNetV2', tf_padding=False), 'MobileNetV2', {}, 40
  ),
  'torchvision_resnet18': Case(_torchvision('resnet18'), 'ResNet', {'depth': 18}, 40),
  'torchvision_mobilenet_v2': Case(_torchvision('mobilenet_v2'), 'MobileNetV2', {}, 40),
  'torchvision_vit': Case(_torchvision('VisionTransformer', **_TORCHVISION_VIT), 'ViT', _VIT, 12),
  'torchvision_swin': Case(_torchvision('SwinTransformer', **_TORCHVISION_SWIN), 'Swin', _SWIN, 40),
  'timm_mobilenetv2': Case(_timm('mobilenetv2_100'), 'MobileNetV2', {}, 40),
  'timm_vit': Case(_timm('vit_tiny_patch16_224', **_TIMM_VIT), 'ViT', _VIT, 12),
  'timm_deit': Case(_timm('deit_tiny_distilled_patch16_224', **_TIMM_VIT), 'ViT', _DEIT, 12),
  'timm_swin': Case(_timm('swin_tiny_patch4_window7_224', **_TIMM_SWIN), 'Swin', _SWIN, 40),
}


def weights(name, shape):
  """A tensor with a spread in everything, told by its name alone, in any version of numpy."""
  x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
  if name.endswith('running_var'):
    x = 0.5 + np.abs(x)
  elif len(shape) >= 2 and 'table' not in name and 'embed' not in name:
    x *= (2 / np.prod(shape[1:])) ** 0.5
  elif len(shape) == 1:
    x = 0.3 * x + (name.endswith('weight') and 1)
  return x.astype(np.float32)


def images(side, count=2):
  """A batch [B, H, W, 3] in float32."""
  return np.random.RandomState(7).standard_normal((count, side, side, 3)).astype(np.float32)


def write_theirs(case, folder):
  """Gives their network random weights and writes it to model.safetensors; gives the network."""
  import torch
  from safetensors.torch import load_file, save_file

  path = Path(folder) / 'model.safetensors'
  model = CASES[case].build()
  library_saves = hasattr(model, 'save_pretrained')
  if library_saves:  # Its names in the file may not be those of its modules.
    model.save_pretrained(folder)
  else:
    save_file({k: x.contiguous() for k, x in model.state_dict().items()}, path)
  tensors = {k: torch.from_numpy(weights(k, x.shape)) for k, x in load_file(path).items()}
  tensors |= {k: x for k, x in load_file(path).items() if not x.is_floating_point()}
  save_file(tensors, path, metadata={'format': 'pt'})
  if not library_saves:
    model.load_state_dict(tensors)
    return model.eval()
  model = type(model).from_pretrained(folder, attn_implementation='eager').eval()
  model.save_pretrained(folder)
  assert all(torch.equal(x, tensors[k]) for k, x in load_file(path).items())
  return model


def logits_of(model, batch, dtype='float64'):
  """What their network computes of images [B, H, W, 3]."""
  import torch

  x = torch.from_numpy(batch).permute(0, 3, 1, 2).to(getattr(torch, dtype))
  with torch.no_grad():
    found = model.to(getattr(torch, dtype))(x)
  return (found.logits if hasattr(found, 'logits') else found).numpy()


def main():
  """Writes all records."""
  from safetensors.numpy import load_file

  for case, about in CASES.items():
    with tempfile.TemporaryDirectory() as name:
      folder = Path(name)
      model = write_theirs(case, folder)
      config = folder / 'config.json'
      held = {
        'config': json.loads(config.read_text()) if config.exists() else {},
        'shapes': {k: x.shape for k, x in load_file(folder / 'model.safetensors').items()},
      }
      if case == KEPT.name:
        KEPT.mkdir(exist_ok=True)
        for path in folder.iterdir():
          (KEPT / path.name).write_bytes(path.read_bytes())
    logits = logits_of(model, images(about.side))
    record = REFERENCE / f'parity_{case}.npz'
    np.savez_compressed(record, about=json.dumps(held), logits=logits)
    print(case, len(held['shapes']), np.abs(logits).max())


if __name__ == '__main__':
  main()
