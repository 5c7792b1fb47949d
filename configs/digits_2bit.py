r"""PreResNet-8 on the digits with 2-bit weights and activations: QAT and cases 1 to 3 over seeds.

python -m saq_jax.main --config configs/digits_2bit.py
"""

from ml_collections import config_dict

from saq_jax.training.parsing import default_config


def get_config() -> config_dict.ConfigDict:
  """The comparison."""
  config = default_config()
  config.data.train_split = 'train[:80%]'
  config.data.batch_size = 32
  config.model.width = 8
  config.quant.bits = 2
  config.quant.act_bits = 2
  config.float_stage.epochs = 15.0
  config.quant_stage.epochs = 12.0
  config.quant_stage.lr = 0.1
  config.quant_stage.scale_lr = 0.1
  config.compare.seeds = 16
  config.compare.rhos = (0.1, 0.2, 0.4)
  config.compare.validation_split = 'train[80%:]'
  return config
