"""`phinetune push`"""

from pathlib import Path


def run_push(run: Path, repository: str, merged: Path | None, private: bool, token: str | None, dry_run: bool) -> None:
    from phinetune.adapter import check_repository, files_to_publish
    from phinetune.api import push
    from phinetune.report import model_card

    check_repository(repository)
    files = files_to_publish(merged or run)
    if dry_run:
        print(model_card(run, repository, merged=merged is not None))
        for path in files:
            print(f"would push {path.name}  {path.stat().st_size:,} bytes")
        return
    address = push(run, repository, merged=merged, private=private, token=token)
    print(f"pushed {len(files)} files and a model card to {address}")
