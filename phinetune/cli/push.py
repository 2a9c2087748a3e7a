"""`phinetune push`"""

from pathlib import Path


def run_push(run: Path, repository: str, merged: Path | None, private: bool, token: str | None, dry_run: bool) -> None:
    from phinetune.adapter import check_repository, files_to_publish, publish
    from phinetune.report import model_card

    check_repository(repository)
    folder = merged or run
    files = files_to_publish(folder)
    card = model_card(run, repository, merged=merged is not None)
    if dry_run:
        print(card)
        for path in files:
            print(f"would push {path.name}  {path.stat().st_size:,} bytes")
        return
    print(f"pushed {len(files)} files and a model card to {publish(folder, files, card, repository, private, token)}")
