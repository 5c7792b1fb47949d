"""What a folder of images holds: its splits, classes and files, and what is wrong with them."""

import concurrent.futures
import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Sequence

from PIL import Image

Note = Callable[[str], object]

_ENDINGS = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp', '.tif', '.tiff')
# Folders that are splits, with the names that tfds gives such splits.
_SPLITS = {'train': 'train', 'val': 'validation', 'validation': 'validation', 'test': 'test'}
_DAMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# Of which a changed picture has the old size, for they are not compressed, or need not be.
_SIZE_IS_FIXED = ('.bmp', '.tif', '.tiff')
_BLOCK = 1000  # Images that are looked at together.
_SECONDS = 10.0  # Between two notes of progress.


@dataclasses.dataclass(frozen=True)
class File:
  """An image file.

  Attributes:
    path: within the folder.
    label: its class.
    size: in bytes.
    seconds: when it was last changed.
  """

  path: str
  label: str
  size: int
  seconds: int


@dataclasses.dataclass(frozen=True)
class Listing:
  """The content of a folder.

  Attributes:
    root: the folder.
    classes: the class folders of each split, sorted.
    files: the images of each split.
    others: paths that are neither class folders nor images.
  """

  root: str
  classes: dict[str, list[str]]
  files: dict[str, list[File]]
  others: list[str]

  @property
  def all_files(self) -> list[File]:
    """The images of all splits."""
    return [file for files in self.files.values() for file in files]

  @property
  def fingerprint(self) -> str:
    """A sum of all paths and sizes, and of the times of files that may change and keep the size."""
    # Without the other times: a copy of a folder is no change of it. So a compressed image that is
    # replaced by another one of the very same name and number of bytes goes unseen.
    digest = hashlib.sha256()
    for file in sorted(self.all_files, key=lambda file: file.path):
      seconds = file.seconds if file.path.lower().endswith(_SIZE_IS_FIXED) else ''
      digest.update(os.fsencode(f'{file.path}\0{file.size}\0{seconds}\0'))
    return digest.hexdigest()


def list_folder(root: str) -> Listing:
  """Lists a folder by names, sizes and times alone.

  Args:
    root: the folder.

  Returns:
    What it holds, without what is hidden.

  Raises:
    ValueError: the folder does not have splits and classes as `prepare_folder` says.
    OSError: a folder cannot be read.
  """
  top = _entries(root)
  # A class may be called 'train' or 'test' too: such a folder has images within and no folders.
  splits = {e.name: _entries(e.path) for e in _folders(top) if e.name in _SPLITS}
  splits = {name: entries for name, entries in splits.items() if _folders(entries)}
  if {'val', 'validation'} <= set(splits):
    raise ValueError(f"{root} has both 'val' and 'validation', which are one split: merge them")
  listing = Listing(root, {}, {}, [e.name for e in top if splits and e.name not in splits])
  for name, entries in (splits or {'train': top}).items():
    split, classes = _SPLITS[name], _folders(entries)
    listing.classes[split] = [e.name for e in classes]
    listing.files[split] = []
    listing.others.extend(_within(root, e) for e in entries if e not in classes)
    for label in classes:
      for entry in _entries(label.path):
        path = _within(root, entry)
        if entry.is_dir() or not entry.name.lower().endswith(_ENDINGS):
          listing.others.append(path)
        else:
          listing.files[split].append(File(path, label.name, *_size_and_seconds(entry)))
  _check_classes(listing)
  return listing


def check_images(listing: Listing) -> None:
  """Makes sure that every class can be trained and every split evaluated.

  Args:
    listing: of the folder.

  Raises:
    ValueError: a class of 'train' or a split has no images.
  """
  # Kept, such a class would be an output that nothing trains; dropped, it would move the labels of
  # the classes after it. Both are silent, so it is for the user to say what is meant.
  empty = sorted(set(listing.classes['train']) - {file.label for file in listing.files['train']})
  if empty:
    raise ValueError(
      f'{listing.root}: classes without an image to train on: {some(empty)}; delete or fill them'
      f' (what is read are files that lie in the class folder itself, {" ".join(_ENDINGS)})'
    )
  if bare := [split for split, files in listing.files.items() if not files]:
    raise ValueError(f'{listing.root}: split {bare[0]!r} has no images: delete or fill it')


def without_damaged(listing: Listing, skip: bool, note: Note) -> Listing:
  """Opens every image, without decoding it.

  Args:
    listing: of the folder.
    skip: leave out what cannot be opened.
    note: is told of the progress.

  Returns:
    The images that can be opened.

  Raises:
    ValueError: names images that cannot be opened, unless they are skipped.
  """

  def opens(file: File) -> bool:
    try:
      with Image.open(os.path.join(listing.root, file.path)):
        return True
    except _DAMAGE:
      return False

  files, total = listing.all_files, len(listing.all_files)
  progress = Progress(f'of {total:,} images looked at', note)
  damaged: set[str] = set()
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for start in range(0, total, _BLOCK):
      progress.tell(start)
      block = files[start : start + _BLOCK]
      damaged |= {file.path for file, whole in zip(block, pool.map(opens, block)) if not whole}
  if damaged and not skip:
    raise ValueError(
      f'{listing.root}: {len(damaged):,} of {total:,} images cannot be opened:'
      f' {some(sorted(damaged))}; mend or delete them, or leave them out with --skip_damaged'
    )
  kept = {
    split: [file for file in files if file.path not in damaged]
    for split, files in listing.files.items()
  }
  return dataclasses.replace(listing, files=kept)


def has_changed(root: str, fingerprint: str) -> bool:
  """Whether a folder is no longer as it was.

  Args:
    root: the folder.
    fingerprint: of its listing then.

  Returns:
    True if it has changed; False too where it cannot be listed, which tells nothing.
  """
  try:
    return list_folder(root).fingerprint != fingerprint
  except ValueError:
    return True
  except OSError:
    return False


class Progress:
  """Tells of a long task, no more often than every ten seconds.

  Example:
    >>> Progress('of 20 images stored', print).tell(10)  # too early for a word
  """

  def __init__(self, what: str, note: Note) -> None:
    self._what, self._note, self._told = what, note, time.monotonic()

  def tell(self, count: int) -> None:
    """Tells how far the task is, if it is time.

    Args:
      count: of what has been done.
    """
    if time.monotonic() - self._told > _SECONDS:
      self._told = time.monotonic()
      self._note(f'{count:,} {self._what}')


def some(names: Sequence[str]) -> str:
  """The first five of many names.

  Args:
    names: such as paths.

  Returns:
    The names as text, and how many more there are.

  Example:
    >>> some([f'{i}.png' for i in range(8)])
    '0.png, 1.png, 2.png, 3.png, 4.png and 3 more'
  """
  more = f' and {len(names) - 5:,} more' if len(names) > 5 else ''
  return ', '.join(text(name) for name in names[:5]) + more


def text(path: str) -> str:
  r"""A path as text that can be stored and printed, whatever its bytes are.

  Args:
    path: as Python has it.

  Returns:
    The path, with bytes that are not UTF-8 written as '\xff'.

  Example:
    >>> text('caf\udce9.png')
    'caf\\xe9.png'
  """
  return os.fsencode(path).decode('utf-8', 'backslashreplace')


def _entries(folder: str) -> list[os.DirEntry[str]]:
  """What lies in a folder, by name, without what is hidden."""
  with os.scandir(folder) as entries:
    return sorted((e for e in entries if not e.name.startswith('.')), key=lambda e: e.name)


def _folders(entries: list[os.DirEntry[str]]) -> list[os.DirEntry[str]]:
  """The folders among them, and links to folders."""
  return [e for e in entries if e.is_dir()]


def _within(root: str, entry: os.DirEntry[str]) -> str:
  """The path within the root; os.path.relpath takes longer than all the rest."""
  return entry.path.removeprefix(root).lstrip(os.sep)


def _size_and_seconds(entry: os.DirEntry[str]) -> tuple[int, int]:
  """Of a file; a link that leads nowhere has neither, and is damaged."""
  try:
    status = entry.stat()
    return status.st_size, int(status.st_mtime)
  except FileNotFoundError:
    return 0, 0


def _check_classes(listing: Listing) -> None:
  """Raises ValueError unless there are classes to train on, and no others to evaluate on."""
  root, classes = listing.root, listing.classes.get('train', [])
  if len(classes) < 2:
    raise ValueError(
      f'{root} has {len(classes)} class folders to train on and needs two or more, as'
      f' {root}/train/CLASS/image.jpg or {root}/CLASS/image.jpg'
    )
  # tfds keeps the names as the lines of a file.
  odd = [name for name in classes if not name.isprintable() or name != name.strip()]
  if odd:
    raise ValueError(f'{root}: give class {odd[0]!r} a name that can be printed, without margins')
  for split, names in listing.classes.items():
    if unknown := sorted(set(names) - set(classes)):
      raise ValueError(f"{root}: {split!r} has classes that 'train' has not: {some(unknown)}")
