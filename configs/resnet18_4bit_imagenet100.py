r"""ResNet-18 on ImageNet-100 with 4-bit weights and activations: an eighth of ImageNet's time.

    python -m saq_jax.main --config configs/resnet18_4bit_imagenet100.py

The paper has no row on ImageNet-100. The 100 classes are those of Contrastive Multiview Coding
(arXiv 1906.05849), about 126,689 training images.

Recipe: [code] for ImageNet (SGD, 90 epochs, cosine, batch 512, rho 0.3); that it holds here is
[ours].

ImageNet is prepared once (docs/data.md). `init_from` names ImageNet weights, which
`huggingface_hub` fetches once (pip install 'saq_jax[hub]'); the head is replaced. They have seen
these classes, so this says how well 4 bits keep what is known.

Hardware and hours: not measured; ImageNet has not been trained here yet.
"""

from ml_collections import config_dict

from saq_jax.training import recipes
from saq_jax.training.parsing import default_config


def get_config() -> config_dict.ConfigDict:
  """ResNet-18 at 4 bits."""
  config = default_config()
  recipes.image_data(config, 'imagenet2012', batch_size=512)
  config.data.classes = recipes.IMAGENET_100
  recipes.authors_quantization(config, bits=4)
  recipes.authors_imagenet_stage(config)
  config.model.name, config.model.depth = 'resnet', 18
  config.init_from = 'hf://timm/resnet18.tv_in1k'
  return config
