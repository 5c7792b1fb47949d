"""Every public name says what it takes and gives; the README's commands and links are real."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / 'saq_jax').rglob('*.py'))
DUNDER = {'__call__'}


def public(tree):
  """Public functions of a module and public methods of its public classes, with their class."""
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
      yield node, None
    if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
      yield node, None
      for item in node.body:
        if isinstance(item, ast.FunctionDef) and (
          not item.name.startswith('_') or item.name in DUNDER
        ):
          yield item, node


def wanted(node):
  """The sections that a function's docstring must have."""
  if isinstance(node, ast.ClassDef):
    return []
  decorators = {ast.unparse(d) for d in node.decorator_list}
  if decorators & {'property', 'functools.cached_property'}:
    return []
  arguments = [a.arg for a in [*node.args.args, *node.args.kwonlyargs]]
  sections = ['Args:'] if [a for a in arguments if a not in ('self', 'cls')] else []
  returns = ast.unparse(node.returns) if node.returns else 'None'
  if returns.startswith('Iterator') and any(isinstance(n, ast.Yield) for n in ast.walk(node)):
    return [*sections, 'Yields:'] if 'contextlib.contextmanager' in decorators else sections
  return sections if returns in ('None', 'NoReturn') else [*sections, 'Returns:']


@pytest.mark.parametrize('module', MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_every_public_name_has_a_whole_docstring(module):
  tree = ast.parse(module.read_text(encoding='utf-8'))
  assert ast.get_docstring(tree), 'the module'
  private = module.name.startswith('_') and module.name != '__init__.py'
  missing = []
  for node, owner in public(tree):
    name = f'{owner.name}.{node.name}' if owner else node.name
    text = ast.get_docstring(node)
    if not text:
      missing.append(f'{name}: no docstring')
    # A model's __call__ takes what its class says.
    elif not private and node.name != '__call__':
      missing += [f'{name}: no {section}' for section in wanted(node) if section not in text]
  assert not missing


def test_the_top_level_names_have_examples_that_run():
  import saq_jax

  data = {'SAQState', 'QuantRule', 'Quantizer', 'WeightQuantizer', '__version__'}
  for name in set(saq_jax.__all__) - data:
    assert '>>>' in getattr(saq_jax, name).__doc__, name


@pytest.mark.parametrize(
  'page', ['README.md', *(f'docs/{p.name}' for p in (ROOT / 'docs').glob('*.md'))]
)
def test_links_and_named_files_exist(page):
  text = (ROOT / page).read_text(encoding='utf-8')
  links = re.findall(r'\]\(([^)#]+)\)', text)
  for link in links:
    if '://' not in link:
      assert ((ROOT / page).parent / link).exists(), link
  for path in re.findall(r'`((?:saq_jax|tests|configs|benchmarks|docs)/[\w./]+\.\w+)`', text):
    assert (ROOT / path).exists(), path


def test_readme_has_its_two_commands_and_ci_runs_the_second():
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  start = text.split('## Start')[1].split('\n## ')[0]
  commands = re.findall(r'```sh\n(.*?)\n```', start, re.S)
  assert commands[0] == 'pip install -e . && python -m saq_jax.main'
  assert commands[1].startswith("pip install -e '.[test]' && pytest")
  assert 'README.md' in (ROOT / '.ci' / 'run').read_text(encoding='utf-8')
