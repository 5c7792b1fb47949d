r"""MobileNetV2 on CIFAR-100 with 4-bit weights and activations.

    python -m saq_jax.main --config configs/mobilenetv2_4bit_cifar100.py

The paper's row: MobileNetV2, 4 bits, 1508.9M bit operations, top-1 75.6 %, top-5 93.7 %.

Recipe: [code] (SGD, 200 epochs, rho 0.4); its script is for PreResNet-20, that the same holds
here is [ours]; that of the full-precision stage is [ours].

CIFAR is prepared once (docs/data.md). A full-precision stage comes first, then QAT and SAQ from
it; `init_from` takes weights instead, such as an authors' checkpoint.

Hardware and hours: not measured.
"""

from ml_collections import config_dict

from saq_jax.training import recipes
from saq_jax.training.parsing import default_config


def get_config() -> config_dict.ConfigDict:
  """MobileNetV2 at 4 bits."""
  config = default_config()
  recipes.cifar_data(config, 'cifar100')
  recipes.authors_quantization(config, bits=4)
  recipes.authors_cifar_stages(config)
  config.model.name = 'mobilenetv2_cifar'
  return config
