"""Names of Transformers: timm's, torchvision's, Hugging Face's and Google's."""

from saq_jax.pretrained.rules import Format, Rule


def _block(
  pattern: str, path: str, attention: dict[str, str], rest: dict[str, str]
) -> tuple[Rule, ...]:
  """The rules of one block: names there to dense layers here, and to norms and dense layers."""
  norms = ('norm1', 'norm2')
  return (
    *(Rule(f'{pattern}{name}', f'{path}/attn/{ours}', 'dense') for name, ours in attention.items()),
    *(
      Rule(f'{pattern}{name}', f'{path}/{ours}', 'norm' if ours in norms else 'dense')
      for name, ours in rest.items()
    ),
  )


_TIMM_REST = {
  r'norm1': 'norm1',
  r'norm2': 'norm2',
  r'mlp\.fc1': 'mlp/fc1',
  r'mlp\.fc2': 'mlp/fc2',
}
# Version 5 of transformers names its modules anew, but writes files with the older names.
_HUGGING_FACE_REST = {
  r'layernorm_before': 'norm1',
  r'layernorm_after': 'norm2',
  r'(?:intermediate\.dense|mlp\.fc1)': 'mlp/fc1',
  r'(?:output\.dense|mlp\.fc2)': 'mlp/fc2',
}
_OUTPUT = r'attention\.(?:output\.dense|o_proj)'

_TIMM_VIT = Format(
  library='timm',
  family='ViT',
  tells=(r'cls_token', r'pos_embed', r'blocks\.0\.attn\.qkv\.weight'),
  prefixes=('timm_model.',),
  head=(r'pre_logits\..*',),
  rules=(
    Rule(r'(cls_token|dist_token|pos_embed)', '{0}', 'array'),
    Rule(r'patch_embed\.proj', 'patch_embed', 'conv'),
    Rule(r'blocks\.(\d+)\.attn\.qkv', 'block_{0}/attn', 'qkv'),
    *_block(r'blocks\.(\d+)\.', 'block_{0}', {r'attn\.proj': 'proj'}, _TIMM_REST),
    Rule(r'norm', 'norm', 'norm'),
    Rule(r'(head|head_dist)', '{0}', 'dense'),
  ),
)

_TORCHVISION_VIT = Format(
  library='torchvision',
  family='ViT',
  tells=(r'class_token', r'conv_proj\.weight', r'encoder\.pos_embedding'),
  rules=(
    Rule(r'class_token', 'cls_token', 'array'),
    Rule(r'encoder\.pos_embedding', 'pos_embed', 'array'),
    Rule(r'conv_proj', 'patch_embed', 'conv'),
    Rule(r'encoder\.layers\.encoder_layer_(\d+)\.self_attention', 'block_{0}/attn', 'qkv'),
    *_block(
      r'encoder\.layers\.encoder_layer_(\d+)\.',
      'block_{0}',
      {r'self_attention\.out_proj': 'proj'},
      {
        r'ln_1': 'norm1',
        r'ln_2': 'norm2',
        r'mlp\.(?:0|linear_1)': 'mlp/fc1',
        r'mlp\.(?:3|linear_2)': 'mlp/fc2',
      },
    ),
    Rule(r'encoder\.ln', 'norm', 'norm'),
    Rule(r'heads\.head', 'head', 'dense'),
  ),
)

_HUGGING_FACE_VIT = Format(
  library='Hugging Face',
  family='ViT',
  tells=(
    r'embeddings\.cls_token',
    r'embeddings\.position_embeddings',
    r'embeddings\.patch_embeddings\.projection\.weight',
  ),
  prefixes=('vit.', 'deit.'),
  rules=(
    Rule(r'embeddings\.cls_token', 'cls_token', 'array'),
    Rule(r'embeddings\.distillation_token', 'dist_token', 'array'),
    Rule(r'embeddings\.position_embeddings', 'pos_embed', 'array'),
    Rule(r'embeddings\.patch_embeddings\.projection', 'patch_embed', 'conv'),
    *_block(
      r'(?:encoder\.layer|layers)\.(\d+)\.',
      'block_{0}',
      {
        r'attention\.(?:attention\.query|q_proj)': 'q',
        r'attention\.(?:attention\.key|k_proj)': 'k',
        r'attention\.(?:attention\.value|v_proj)': 'v',
        _OUTPUT: 'proj',
      },
      _HUGGING_FACE_REST,
    ),
    Rule(r'layernorm', 'norm', 'norm'),
    Rule(r'(?:classifier|cls_classifier)', 'head', 'dense'),
    Rule(r'distillation_classifier', 'head_dist', 'dense'),
  ),
)

_GOOGLE_BLOCK = r'Transformer/encoderblock_(\d+)/'
_GOOGLE_ATTENTION = rf'{_GOOGLE_BLOCK}MultiHeadDotProductAttention_1/'

_GOOGLE_VIT = Format(
  library='Google',
  family='ViT',
  tells=(r'cls', r'embedding/kernel', r'Transformer/posembed_input/pos_embedding'),
  head=(r'pre_logits/.*',),
  rules=(
    Rule(r'cls', 'cls_token', 'array'),
    Rule(r'Transformer/posembed_input/pos_embedding', 'pos_embed', 'array'),
    Rule(r'embedding', 'patch_embed', 'flax'),
    *(
      Rule(f'{_GOOGLE_ATTENTION}{name}', f'block_{{0}}/attn/{name[0]}', 'flax qkv')
      for name in ('query', 'key', 'value')
    ),
    Rule(f'{_GOOGLE_ATTENTION}out', 'block_{0}/attn/proj', 'flax out'),
    Rule(f'{_GOOGLE_BLOCK}LayerNorm_0', 'block_{0}/norm1', 'flax'),
    Rule(f'{_GOOGLE_BLOCK}LayerNorm_2', 'block_{0}/norm2', 'flax'),
    Rule(f'{_GOOGLE_BLOCK}MlpBlock_3/Dense_(\\d)', 'block_{0}/mlp/fc{1+1}', 'flax'),
    Rule(r'Transformer/encoder_norm', 'norm', 'flax'),
    Rule(r'head', 'head', 'flax'),
  ),
)


def _timm_swin(merge: str) -> tuple[Rule, ...]:
  """The rules of a Swin; `merge` is the path of 'layers.n.downsample'."""
  return (
    Rule(r'patch_embed\.proj', 'patch_embed', 'conv'),
    Rule(r'patch_embed\.norm', 'patch_norm', 'norm'),
    Rule(r'layers\.(\d)\.blocks\.(\d+)\.attn\.qkv', 'stage{0}_{1}/attn', 'qkv'),
    Rule(
      r'layers\.(\d)\.blocks\.(\d+)\.attn\.relative_position_bias_table',
      'stage{0}_{1}/attn/relative_bias',
      'array',
    ),
    *_block(r'layers\.(\d)\.blocks\.(\d+)\.', 'stage{0}_{1}', {r'attn\.proj': 'proj'}, _TIMM_REST),
    Rule(r'layers\.(\d)\.downsample\.norm', f'{merge}/norm', 'norm'),
    Rule(r'layers\.(\d)\.downsample\.reduction', f'{merge}/reduction', 'dense'),
    Rule(r'norm', 'norm', 'norm'),
    Rule(r'head(?:\.fc)?', 'head', 'dense'),
  )


_SWIN_TELL = r'layers\.0\.blocks\.0\.attn\.relative_position_bias_table'

# A merge stood at the end of a stage, and stands in newer files at the beginning of the next one.
_OLD_SWIN = Format(
  library='Microsoft or older timm',
  family='Swin',
  tells=(_SWIN_TELL, r'layers\.0\.downsample\.reduction\.weight'),
  rules=_timm_swin('merge{0}'),
)
_TIMM_SWIN = Format(
  library='timm',
  family='Swin',
  tells=(_SWIN_TELL,),
  prefixes=('timm_model.',),
  rules=_timm_swin('merge{0-1}'),
)


def _torchvision_stage(stage: int) -> tuple[Rule, ...]:
  """Of 'features': stages are at odd numbers, and what merges before the next at even ones."""
  place, path = rf'features\.{2 * stage + 1}\.(\d+)\.', f'stage{stage}_{{0}}'
  return (
    Rule(f'{place}attn\\.qkv', f'{path}/attn', 'qkv'),
    Rule(f'{place}attn\\.relative_position_bias_table', f'{path}/attn/relative_bias', 'array'),
    *_block(
      place,
      path,
      {r'attn\.proj': 'proj'},
      {r'norm1': 'norm1', r'norm2': 'norm2', r'mlp\.0': 'mlp/fc1', r'mlp\.3': 'mlp/fc2'},
    ),
    Rule(rf'features\.{2 * stage + 2}\.norm', f'merge{stage}/norm', 'norm'),
    Rule(rf'features\.{2 * stage + 2}\.reduction', f'merge{stage}/reduction', 'dense'),
  )


_TORCHVISION_SWIN = Format(
  library='torchvision',
  family='Swin',
  tells=(r'features\.0\.0\.weight', r'features\.1\.0\.attn\.relative_position_bias_table'),
  rules=(
    Rule(r'features\.0\.0', 'patch_embed', 'conv'),
    Rule(r'features\.0\.2', 'patch_norm', 'norm'),
    *(rule for stage in range(4) for rule in _torchvision_stage(stage)),
    Rule(r'norm', 'norm', 'norm'),
    Rule(r'head', 'head', 'dense'),
  ),
)

_HUGGING_FACE_STAGE = r'encoder\.layers\.(\d)\.'

_HUGGING_FACE_SWIN = Format(
  library='Hugging Face',
  family='Swin',
  tells=(
    r'embeddings\.patch_embeddings\.projection\.weight',
    rf'{_HUGGING_FACE_STAGE}blocks\.0\.attention\..*\.?relative_position_bias_table',
  ),
  prefixes=('swin.',),
  rules=(
    Rule(r'embeddings\.patch_embeddings\.projection', 'patch_embed', 'conv'),
    Rule(r'embeddings\.norm', 'patch_norm', 'norm'),
    Rule(
      rf'{_HUGGING_FACE_STAGE}blocks\.(\d+)\.attention\.(?:self|relative_position_bias)'
      r'\.relative_position_bias_table',
      'stage{0}_{1}/attn/relative_bias',
      'array',
    ),
    *_block(
      rf'{_HUGGING_FACE_STAGE}blocks\.(\d+)\.',
      'stage{0}_{1}',
      {
        r'attention\.(?:self\.query|q_proj)': 'q',
        r'attention\.(?:self\.key|k_proj)': 'k',
        r'attention\.(?:self\.value|v_proj)': 'v',
        _OUTPUT: 'proj',
      },
      _HUGGING_FACE_REST,
    ),
    Rule(rf'{_HUGGING_FACE_STAGE}downsample\.norm', 'merge{0}/norm', 'norm'),
    Rule(rf'{_HUGGING_FACE_STAGE}downsample\.reduction', 'merge{0}/reduction', 'dense'),
    Rule(r'layernorm', 'norm', 'norm'),
    Rule(r'classifier', 'head', 'dense'),
  ),
)

# What has the tells of another one too comes before it.
FORMATS = (
  _HUGGING_FACE_SWIN,
  _HUGGING_FACE_VIT,
  _TIMM_VIT,
  _TORCHVISION_VIT,
  _GOOGLE_VIT,
  _OLD_SWIN,
  _TIMM_SWIN,
  _TORCHVISION_SWIN,
)
