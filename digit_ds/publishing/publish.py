"""``digit-ds publish``: a released model directory becomes a repository on the Hugging Face Hub."""

from pathlib import Path

from digit_ds import hub
from digit_ds.errors import UserError
from digit_ds.files import read_json
from digit_ds.model.released import CONFIG, WEIGHTS, read_config, read_model
from digit_ds.publishing.card import model_card
from digit_ds.publishing.settings import PublishSettings


def publish(settings: PublishSettings) -> None:
    """Upload model and card in one commit: readers of the repository see all of it or nothing.

    What a published checkpoint carried besides (``carried.safetensors``) is not uploaded: it is the work of others.

    Raises:
        UserError: the directory holds no model, a file is damaged, or the hub refuses or cannot be reached.
    """
    directory = Path(settings.model)
    repository, revision = hub.parse(f"{hub.SCHEME}{settings.repository}")
    if revision is not None:
        raise UserError(f"{settings.repository}: names a revision, expected OWNER/NAME")
    read_model(directory)  # a damaged file is found here and not by those who download it
    spec, provenance, _ = read_config(directory)
    scores = None if settings.scores is None else read_json(settings.scores)
    if scores is not None and not isinstance(scores, dict):
        raise UserError(f"{settings.scores}: holds {type(scores).__name__}, expected a file that evaluate wrote")
    recipe = None if settings.recipe is None else _text(Path(settings.recipe))
    card = model_card(repository, spec, provenance, settings.license, scores, recipe)

    from huggingface_hub import CommitOperationAdd, HfApi

    files: dict[str, Path | bytes] = {"README.md": card.encode(), CONFIG: directory / CONFIG}
    files[WEIGHTS] = directory / WEIGHTS
    with hub.errors(settings.repository):
        api = HfApi()
        api.create_repo(repository, private=settings.private or None, exist_ok=True)
        done = api.create_commit(
            repository,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()],
            commit_message=f"{spec.kind} model of digit_ds",
        )
    print(f"{settings.repository}: {done.commit_url}")
    print(f'digit_ds.load_model("{hub.SCHEME}{repository}")')


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}), expected a recipe") from error
