r"""PreResNet-20 on CIFAR-10 with 4-bit weights and activations.

    python -m saq_jax.main --config configs/preresnet20_4bit_cifar10.py

The paper lists CIFAR-10 among its datasets (v5); its figures are not known to us.

Recipe: [code] (SGD, 200 epochs, rho 0.4); its script is for CIFAR-100, that the same holds here
is [ours]; that of the full-precision stage is [ours].

CIFAR is prepared once (docs/data.md). A full-precision stage comes first, then QAT and SAQ from
it; `init_from` takes weights instead, such as an authors' checkpoint.

Hardware and hours: not measured on an accelerator; docs/benchmarks.md has the step on a CPU.
"""

from ml_collections import config_dict

from saq_jax.training import recipes
from saq_jax.training.parsing import default_config


def get_config() -> config_dict.ConfigDict:
  """PreResNet-20 at 4 bits."""
  config = default_config()
  recipes.cifar_data(config, 'cifar10')
  recipes.authors_quantization(config, bits=4)
  recipes.authors_cifar_stages(config)
  config.model.depth, config.model.width = 20, 16
  return config
