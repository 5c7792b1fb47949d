r"""PreResNet-8 on the digits with 4-bit weights and activations: the main job.

    python -m saq_jax.main --config configs/digits_4bit.py

is what `python -m saq_jax.main` runs. 1,797 real scans of 8x8 pixels; a full-precision stage,
then QAT and SAQ (case 3) from it. Recipe: ours, after the authors' for CIFAR (SGD with Nesterov
momentum, LIQ with normalised weights, first and last layer at 8 bits). The paper has no such row.

Expected: about a minute and a half on two cores; 98 to 99 % of the test split for SAQ at 4 bits.
"""

from ml_collections import config_dict

from saq_jax.training.parsing import default_config


def get_config() -> config_dict.ConfigDict:
  """The defaults of the package, as they are."""
  return default_config()
