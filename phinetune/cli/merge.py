"""`phinetune merge`"""

from pathlib import Path


def run_merge(
    run: Path, output: Path | None, dtype: str, onto: str, data: str | None, allow_mismatch: bool, overwrite: bool
) -> None:
    from phinetune.api import merge
    from phinetune.cli.quiet import quiet_libraries

    quiet_libraries()
    folder = merge(
        run,
        output,
        dtype=dtype,
        onto=onto,
        data=data,
        allow_template_mismatch=allow_mismatch,
        overwrite=overwrite,
    )
    print(f"Talk to it:   phinetune chat {folder}")
