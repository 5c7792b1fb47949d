r"""PreResNet-8 on the digits with 2-bit weights and activations: QAT and cases 1 to 3, 16 seeds.

    python -m saq_jax.main --config configs/digits_2bit.py

Trains 16 float networks, and from each of them QAT and cases 1, 2 and 3, the cases at every rho in
`compare.rhos`: 176 runs. Each case's rho is the best on the last fifth of the training split, which
nothing is trained on; the test split has no part in that. First and last layer at 8 bits. Recipe:
ours, after the authors' for CIFAR; the learning rate is the best of 0.02, 0.05 and 0.1 for QAT, on
the validation split with 4 seeds. The paper has no such row.

Obtained (means over the seeds, 95 % intervals; sharpness: change of the training loss after one
gradient step of length 0.1):

                  rho   test accuracy    less QAT        sharpness
    QAT                 97.13 ± 0.46 %                   0.0214 ± 0.0063
    Case 1        0.3   97.25 ± 0.36 %   +0.12 ± 0.62    0.0152 ± 0.0029   difference not shown
    Case 2        0.1   97.14 ± 0.46 %   +0.02 ± 0.51    0.0136 ± 0.0038   not shown (p = 0.03)
    Case 3 (SAQ)  0.8   97.14 ± 0.31 %   +0.02 ± 0.61    0.0118 ± 0.0031   flatter, p = 0.007

p counts below 0.01, 5 % over the five pairs compared. So SAQ's networks are flatter here, 1.8
times, and no difference in accuracy is shown; the float networks reach 97.74 ± 0.33 %. 0.8 is the
largest rho tried. About seven minutes on two cores.
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
  config.compare.rhos = (0.1, 0.3, 0.8)
  config.compare.validation_split = 'train[80%:]'
  return config
