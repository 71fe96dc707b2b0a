"""From a training checkpoint to the released model directory."""

from pathlib import Path

from digit_ds.errors import UserError
from digit_ds.model.released import CONFIG, WEIGHTS, read_config, write_model
from digit_ds.model.tensor_file import holds
from digit_ds.training.settings import ExportSettings
from digit_ds.training.stored import Damaged, StoredState, is_complete, newest_checkpoint


def export(settings: ExportSettings) -> None:
    """Write the released model of a run (its newest complete checkpoint) or of one checkpoint.

    Weights are the float32 master weights, or with ``ema`` their moving average. Needs no process group, no GPU and no
    memory for the model: it goes from file to file in pieces.
    Where ``out`` holds this very model already, nothing is done: a job killed after it had exported runs again.

    Raises:
        UserError: there is no complete checkpoint, it is damaged, it holds no moving average, or ``out`` holds another
            model.
    """
    source, out = Path(settings.run), settings.out
    path = source if is_complete(source) else newest_checkpoint(source / "checkpoints")
    if path is None and not source.is_dir():
        raise UserError(f"{source}: is not a directory, expected a run directory or one checkpoint in it")
    if path is None:
        raise UserError(f"{source}: holds no complete checkpoint, expected a run directory or one checkpoint in it")
    try:
        stored = StoredState(path)
        stored.verify()
    except Damaged as error:
        raise UserError(f"{error}; name another checkpoint in {path.parent} to export that one") from error
    if settings.ema and "average" not in stored.kinds():
        raise UserError(f"{path}: holds no moving average, since training.ema_decay was 0")
    contents = stored.contents("average" if settings.ema else "weight")
    progress = stored.manifest["progress"]
    provenance = {**stored.manifest["provenance"], "steps": progress["step"], "images": progress["images"]}
    same = (Path(out) / CONFIG).is_file() and read_config(Path(out))[:2] == (stored.spec, provenance)
    if same and holds(Path(out) / WEIGHTS, contents):
        print(f"{out}: holds this model already, nothing to do")
        return
    write_model(out, stored.spec, contents, provenance)
    print(f"{out}: step {progress['step']} of {source}")
