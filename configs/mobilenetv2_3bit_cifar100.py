r"""MobileNetV2 on CIFAR-100 with 3-bit weights and activations.

    python -m saq_jax.main --config configs/mobilenetv2_3bit_cifar100.py

The paper's row: MobileNetV2, 3 bits, 877.1M bit operations, top-1 74.4 %, top-5 93.2 %.

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
  """MobileNetV2 at 3 bits."""
  config = default_config()
  recipes.cifar_data(config, 'cifar100')
  recipes.authors_quantization(config, bits=3)
  recipes.authors_cifar_stages(config)
  config.model.name = 'mobilenetv2_cifar'
  return config
