r"""MobileNetV2 on ImageNet with 4-bit weights and activations.

    python -m saq_jax.main --config configs/mobilenetv2_4bit.py

The paper's row: MobileNetV2, 4 bits, 5.3G bit operations, top-1 70.2 %, top-5 89.4 %.

Recipe: [code], as for ResNet-18 (SGD, 90 epochs, cosine, batch 512, rho 0.3), with crops from 20
% of the area on. The weights named here are timm's, not the authors' [ours].

ImageNet is prepared once (docs/data.md). `init_from` names the weights to start from, which
`huggingface_hub` fetches once (pip install 'saq_jax[hub]'); a directory or file of your own does
as well.

Hardware and hours: not measured; ImageNet has not been trained here yet.
"""

from ml_collections import config_dict

from saq_jax.training import recipes
from saq_jax.training.parsing import default_config


def get_config() -> config_dict.ConfigDict:
  """MobileNetV2 at 4 bits."""
  config = default_config()
  recipes.image_data(config, 'imagenet2012', batch_size=512)
  recipes.authors_quantization(config, bits=4)
  recipes.authors_imagenet_stage(config)
  config.augment.crop_scale = (0.2, 1.0)
  config.model.name = 'mobilenetv2'
  config.init_from = 'hf://timm/mobilenetv2_100.ra_in1k'
  return config
