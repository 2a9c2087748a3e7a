"""`phinetune push`"""

from pathlib import Path


def run_push(run: Path, repository: str, merged: Path | None, private: bool, token: str | None, dry_run: bool) -> None:
    from phinetune.adapter import check_repository, files_to_publish
    from phinetune.api import push
    from phinetune.report import model_card

    if not dry_run:
        print(f"pushed to {push(run, repository, merged=merged, private=private, token=token)}")
        return
    check_repository(repository)
    files = files_to_publish(merged or run, merged=merged is not None)
    print(model_card(run, repository, merged=merged is not None))
    for name, content in files.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"would push {name}  {size:,} bytes")
