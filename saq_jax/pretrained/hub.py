"""Repositories of the Hugging Face Hub, through its own client and cache."""

import re
from pathlib import Path

from saq_jax.pretrained.errors import PretrainedError

SCHEME = 'hf://'
_PATTERNS = ['*.safetensors', '*.json']
_SOURCE = re.compile(r'hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^@\s]+))?')


def fetch(source: str) -> Path:
  """Brings the weights and settings of a repository into the client's cache.

  What was fetched once is there without a network too.

  Args:
    source: 'hf://org/name' or 'hf://org/name@revision'.

  Returns:
    The directory of the snapshot, whose name is the commit.

  Raises:
    PretrainedError: if the client is not installed, or there is no such repository, or it cannot
      be reached and is not in the cache.
  """
  match = _SOURCE.fullmatch(source)
  if match is None:
    raise PretrainedError(f"{source}: write 'hf://org/name' or 'hf://org/name@revision'")
  try:
    import huggingface_hub
  except ImportError as error:
    raise PretrainedError(
      f"{source}: huggingface_hub is not installed: pip install 'saq_jax[hub]', or download the "
      'files and give their directory'
    ) from error
  try:
    path = huggingface_hub.snapshot_download(
      match['repo'], revision=match['revision'], allow_patterns=_PATTERNS
    )
  # What the client raises differs between its versions; only its words are used.
  except Exception as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise PretrainedError(
      f'{source} could not be fetched, and is not in the cache: {reason[:200]} '
      '(check the name, the network and HF_HUB_OFFLINE, or give a directory with its files)'
    ) from error
  return Path(path)
