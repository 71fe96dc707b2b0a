"""Classes of pictures that lie in no class folder: Kaggle's ``LOC_val_solution.csv`` or ImageNet's devkit."""

import csv
import io
import tarfile
from pathlib import Path

from digit_ds.errors import UserError
from digit_ds.files import sha256

_TRUTH, _META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"


class Labels:
    """The class of each picture by its file name without suffix."""

    def __init__(self, path: Path | str) -> None:
        """Read ``LOC_val_solution.csv`` (columns ``ImageId``, ``PredictionString``) or the devkit, packed or not.

        Raises:
            UserError: it is neither.
        """
        self.path = Path(path)
        if self.path.is_dir() or self.path.name.endswith((".tar.gz", ".tgz", ".tar")):
            self._classes = self._devkit()
        else:
            self._classes = self._solution()

    @property
    def stamp(self) -> str:
        """Names the content."""
        return sha256(self.path / _TRUTH if self.path.is_dir() else self.path)

    def class_of(self, path: str) -> str:
        """The class of a picture.

        Raises:
            UserError: the file has none.
        """
        stem = path.rpartition("/")[2].partition(".")[0]
        if stem not in self._classes:
            raise UserError(f"{self.path}: has no class for {path}, expected one for each image")
        return self._classes[stem]

    def name(self, path: str) -> str:
        """``class/path`` of a picture."""
        return f"{self.class_of(path)}/{path}"

    def _solution(self) -> dict[str, str]:
        expected = "expected a CSV file with the columns ImageId and PredictionString, or ImageNet's devkit"
        try:
            with self.path.open(encoding="utf-8", newline="") as stream:
                classes = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(stream)}
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}), {expected}") from error
        except (KeyError, IndexError, AttributeError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{self.path}: is not a file of labels ({error!r}), {expected}") from error
        if bad := next((name for name in classes.values() if "/" in name or name.startswith(".")), None):
            raise UserError(f"{self.path}: has the class {bad!r}, expected a name without '/' that begins with no '.'")
        return classes

    def _devkit(self) -> dict[str, str]:
        """Validation image number n has the n-th line's ILSVRC number, which ``meta.mat`` translates."""
        from scipy.io import loadmat  # as long to import as the rest together

        try:
            synsets = loadmat(io.BytesIO(self._part(_META)), squeeze_me=True)["synsets"]
            folders = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
            numbers = self._part(_TRUTH).split()
            return {f"ILSVRC2012_val_{at:08d}": folders[int(number)] for at, number in enumerate(numbers, 1)}
        except UserError:
            raise
        except Exception as error:  # readers raise arbitrary exceptions on malformed files
            raise UserError(f"{self.path}: cannot be read ({error!r}), expected ImageNet's devkit") from error

    def _part(self, name: str) -> bytes:
        if self.path.is_dir():
            return (self.path / name).read_bytes()
        with tarfile.open(self.path) as packed:
            for member in packed:
                if member.isreg() and member.name.endswith(name) and (stream := packed.extractfile(member)):
                    return stream.read()
        raise UserError(f"{self.path}: does not hold {name}, expected ImageNet's devkit")
