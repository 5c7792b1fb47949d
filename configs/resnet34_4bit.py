r"""ResNet-34 on ImageNet with 4-bit weights and activations.

    python -m saq_jax.main --config configs/resnet34_4bit.py

We know of no figure of the paper for ResNet-34.

Recipe: [code], from its script for ResNet-18 at 4 bits (SGD, 90 epochs, cosine, batch 512, rho
0.3); that the same holds for ResNet-34 is [ours].

ImageNet is prepared once (docs/data.md). `init_from` names the weights to start from, which
`huggingface_hub` fetches once (pip install 'saq_jax[hub]'); a directory or file of your own does
as well.

Hardware and hours: not measured; ImageNet has not been trained here yet.
"""

from ml_collections import config_dict

from saq_jax.training import recipes
from saq_jax.training.parsing import default_config


def get_config() -> config_dict.ConfigDict:
  """ResNet-34 at 4 bits."""
  config = default_config()
  recipes.image_data(config, 'imagenet2012', batch_size=512)
  recipes.authors_quantization(config, bits=4)
  recipes.authors_imagenet_stage(config)
  config.model.name, config.model.depth = 'resnet', 34
  config.init_from = 'hf://timm/resnet34.tv_in1k'
  return config
