"""The part of the metadata that pyproject.toml cannot state: README.md with links that lead to the repository.

[training](docs/training.md)      REPOSITORY/blob/vVERSION/docs/training.md
![method](docs/images/x.svg)      REPOSITORY/raw/vVERSION/docs/images/x.svg
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
OF_THE_REPOSITORY = r"(?![a-z]+:|//|#)"  # neither an address nor a heading of the page itself


def found(pattern: str, path: str) -> str:
    (one,) = re.findall(pattern, (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    return one


def page() -> str:
    """README.md as a package index shows it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    repository = found(r'^Repository = "(.+)"$', "pyproject.toml")
    tag = "v" + found(r'^__version__ = "(.+)"$', "peft_input_tuning/version.py")
    images = rf'(!\[[^\]]*\]\(|\bsrc(?:set)?="){OF_THE_REPOSITORY}'
    pages = rf'(\]\(|\bhref="){OF_THE_REPOSITORY}'
    text = re.sub(images, rf"\g<1>{repository}/raw/{tag}/", text)
    return re.sub(pages, rf"\g<1>{repository}/blob/{tag}/", text)


if __name__ == "__main__":
    setup(long_description=page(), long_description_content_type="text/markdown")
