"""``digit-ds fetch``: the published weights, checked and converted, in one folder."""

import shlex
import shutil
from functools import cached_property
from pathlib import Path, PurePosixPath

from digit_ds import hub
from digit_ds.errors import UserError, file_error
from digit_ds.files import make_directory, write_atomically
from digit_ds.lock import DirectoryLock, remove_unfinished
from digit_ds.publishing.origins import Folder, Origin, Repository
from digit_ds.publishing.rows import (
    REPOSITORY,
    ROWS,
    TRIAL,
    VQGAN,
    VQGAN_ADDRESS,
    find_checkpoint,
    find_file,
    folder_of,
)
from digit_ds.publishing.settings import FetchSettings, Size

CARRIED_VQGAN = "vqgan_of_{}.ckpt"
"""The VQGAN as a pixel decoder's checkpoint carries it, by the name of the decoder's directory."""


def fetch(settings: FetchSettings) -> None:
    """Bring what a row of the paper's table needs to ``settings.dir`` and print the command that draws pictures.

    Everything arrives under its name only when it is complete and checked; what is there already is kept.

    Raises:
        UserError: a file is not there, cannot be reached, is damaged, or does not fit the others.
    """
    folder = Path(settings.dir)
    try:
        lock = DirectoryLock(folder)
    except OSError as error:
        raise file_error(error, folder) or error from error
    try:
        remove_unfinished(folder)
        if settings.size == "trial":
            _write_trial(settings, folder)
        else:
            _Fetching(settings, settings.size, folder).run()
    finally:
        lock.release()


def _write_trial(settings: FetchSettings, folder: Path) -> None:
    from digit_ds.publishing.trial import write_trial

    for name, given in (("from", settings.source), ("prior", settings.prior), ("decoder", settings.decoder)):
        if given is not None:
            raise UserError(f"--{name} {given}: is given with trial, expected base or large with it")
    parts = write_trial(folder)
    print(f"{folder}: small random networks; their pictures are noise\n")
    print(f"Pictures:\n{_command(parts['prior'], parts['decoder'], parts['vqgan'], ROWS['base'].top_k)}")


class _Fetching:
    """One run of the command; the origin is asked only when something is missing."""

    def __init__(self, settings: FetchSettings, size: Size, folder: Path):
        if (folder / TRIAL).exists():
            raise UserError(f"{folder}: holds the files of fetch trial, expected another folder (--dir), or delete it")
        self.settings, self.size, self.folder, self.row = settings, size, folder, ROWS[size]
        self.staging = folder / ".downloads"
        self.prior = folder / folder_of(size, "prior", settings.prior)
        self.decoder = folder / folder_of(size, "decoder", settings.decoder)
        self.codebook = folder / self.row.codebook
        self.encoder = folder / PurePosixPath(self.row.encoder).name

    @cached_property
    def origin(self) -> Origin:
        """Where files come from. Offline without a folder it is what the hub client's cache holds."""
        if self.settings.source is not None:
            return Folder(self.settings.source)
        if hub.is_offline():
            import huggingface_hub

            with hub.errors(f"{REPOSITORY} (expected in the client's cache, or files in --from DIR)"):
                return Folder(huggingface_hub.snapshot_download(REPOSITORY, local_files_only=True))
        return Repository(REPOSITORY, self.staging)

    def run(self) -> None:
        """Fetch part by part, the small ones first."""
        if self.settings.source is not None:
            _ = self.origin  # a folder that is not there is refused even where nothing is missing
        self._fetch_codebook()
        self._fetch_model("prior", self.prior, self.settings.prior)
        self._fetch_model("decoder", self.decoder, self.settings.decoder)
        self._fetch_encoder()
        vqgan = self._find_vqgan()
        self._check()
        shutil.rmtree(self.staging, ignore_errors=True)
        print(f"\nPictures:\n{_command(self.prior, self.decoder, vqgan, self.row.top_k)}")

    def _fetch_codebook(self) -> None:
        if not self._is_there(self.codebook):
            path = find_file(self.origin.files, self.row.codebook, self.origin.name)
            source = self.origin.bring(path)
            from digit_ds.tokenizer.codebook import load_codebook

            load_codebook(source)
            self._copy(source, self.codebook)

    def _fetch_model(self, part: str, out: Path, wanted: str | None) -> None:
        from digit_ds.model.released import read_config

        if self._is_there(out / "config.json"):
            _check_kind(str(out), part, read_config(out)[0].kind)
            return
        path = find_checkpoint(self.origin.files, self.size, part, wanted, self.origin.name)
        source = self.origin.bring(path)
        from digit_ds.model.official import from_official
        from digit_ds.model.settings import FromOfficial

        spec = from_official(FromOfficial(checkpoint=str(source), out=str(out)))
        if self.staging in source.parents:
            source.unlink()
        try:
            _check_kind(path, part, spec.kind)
        except UserError:
            shutil.rmtree(out)
            raise
        print(f"{out}: {spec.kind}, {spec.layers} layers of width {spec.width}, {spec.classes} classes, from {path}")

    def _fetch_encoder(self) -> None:
        if self._is_there(self.encoder):
            return
        from digit_ds.tokenizer.vit_checkpoints import read_vit_checkpoint

        if (source := self._copied(self.encoder.name)) is None:
            source = self._download(self.row.encoder)
        try:
            read_vit_checkpoint(source)
        except UserError:
            if self.staging in source.parents:
                source.unlink()
            raise
        self._copy(source, self.encoder)

    def _download(self, address: str) -> Path:
        """A file of Meta's server, by PyTorch's client, which starts an interrupted download again."""
        import http.client

        import torch

        if self.settings.source is not None or hub.is_offline():
            raise UserError(
                f"{self.settings.source or self.folder}: has no {PurePosixPath(address).name}, expected the file of "
                f"{address}"
            )
        target = self.staging / PurePosixPath(address).name
        try:
            make_directory(self.staging)
            for rest in self.staging.glob("*.partial"):  # of a killed one
                rest.unlink()
            if not target.exists():
                torch.hub.download_url_to_file(address, str(target))
        except (OSError, http.client.HTTPException) as error:
            known = file_error(error, self.staging) if isinstance(error, OSError) else None
            raise known or UserError(f"{address}: cannot be downloaded ({' '.join(str(error).split())})") from error
        return target

    def _find_vqgan(self) -> Path:
        """MAGE's file where somebody put it, else the VQGAN that the pixel decoder's checkpoint carries."""
        from digit_ds.model.official import write_carried_vqgan
        from digit_ds.tokenizer.vqgan import load_vqgan

        place = self.folder / VQGAN
        if not place.exists() and (source := self._copied(VQGAN)) is not None:
            load_vqgan(source)
            self._copy(source, place)
        if place.exists():
            load_vqgan(place)
            return place
        carried = self.folder / CARRIED_VQGAN.format(self.decoder.name)
        if not carried.exists() and not write_carried_vqgan(self.decoder, carried):
            raise UserError(
                f"{place}: is missing and the decoder's checkpoint carries no VQGAN, expected MAGE's file there: "
                f"download {VQGAN_ADDRESS} in a browser, then run this command again"
            )
        print(
            f"{carried}: the VQGAN that the decoder's checkpoint carries; MAGE's own file is {VQGAN} of "
            f"{VQGAN_ADDRESS} (a browser is needed) and is taken instead when it lies in {self.folder}"
        )
        return carried

    def _check(self) -> None:
        """Refuse parts that do not belong together."""
        from digit_ds.model.released import read_config
        from digit_ds.tokenizer.codebook import load_codebook

        codes = load_codebook(self.codebook).codes
        for directory in (self.prior, self.decoder):
            spec, _, _ = read_config(directory)
            if spec.discriminative_codes != codes:
                raise UserError(
                    f"{directory}: has {spec.discriminative_codes} discriminative codes, expected {codes} as "
                    f"{self.codebook}"
                )

    def _copied(self, name: str) -> Path | None:
        """A file of that name in the folder of copied files."""
        if self.settings.source is None:
            return None
        names = [path for path in self.origin.files if PurePosixPath(path).name == name]
        return self.origin.bring(find_file(names, name, self.origin.name)) if names else None

    def _copy(self, source: Path, target: Path) -> None:
        """Put a checked file under its final name."""
        if self.staging in source.parents:
            source.replace(target)
        else:
            write_atomically(target, lambda temporary: shutil.copyfile(source, temporary))
        print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")

    def _is_there(self, path: Path) -> bool:
        if there := path.exists():
            print(f"{path}: is there already")
        return there


def _command(prior: Path, decoder: Path, vqgan: Path, top_k: int) -> str:
    """The line that samples pictures from the fetched models."""
    from digit_ds.model.released import read_config

    models = ["--prior", prior, "--decoder", decoder, "--vqgan", vqgan]
    drawing: list[object] = ["--top-k", top_k]
    if read_config(decoder)[0].kind == "ar":
        drawing += ["--decoder-top-p", 0.8]
    return shlex.join(map(str, ["digit-ds", "sample", *models, *drawing, "--out", "samples"]))


def _check_kind(found: str, part: str, kind: str) -> None:
    """Refuse a model of a kind that ``part`` is not: ``found`` is its directory, or the checkpoint it comes from."""
    kinds = {"prior": ("prior",), "decoder": ("ar", "nar")}[part]
    if kind not in kinds:
        raise UserError(f"{found}: has kind {kind}, expected {' or '.join(kinds)} as {part} (--{part})")
