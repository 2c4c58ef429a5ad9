"""A model's repository on the Hugging Face Hub: its file and its card."""

import json
import re
from collections.abc import Mapping
from typing import Any

FILE, CARD = "degrader.safetensors", "README.md"
_CARD = """---
library_name: degflow
license: other
tags:
- super-resolution
- image-degradation
---

# {repo}

A degrader of degflow: it makes low-resolution images from high-resolution
photographs, at any scale from {low:g} to {high:g}, as the camera of its training would have taken them.

```python
from degflow import Degrader

degrader = Degrader.load("{uri}")
lr = degrader.degrade("photo.jpg", scale={middle:g}, seed=0)  # a PIL image of the photograph's size
```

- **Draws**: {draws}
- **Trained on levels**: {levels}
- **sha256** of the file: `{sha256}`

## Data, cameras and limits

Please write here: which camera and photographs it learned from, under which licence, and where its images fall short.
What the training recorded:

```json
{provenance}
```
"""


def card(
    repo: str, uri: str, levels: Mapping[str, float], draws: bool, sha256: str, provenance: Mapping[str, Any]
) -> str:
    """A model card for the owner to complete.

    Args:
        repo: USER/NAME. uri: of the file.
        levels: label -> scale that it was trained on.
        draws: whether it draws, or makes one image of each photograph and scale.
        sha256: of the file.
        provenance: that of the file.
    """
    low, high = min(levels.values()), max(levels.values())
    return _CARD.format(
        repo=repo,
        uri=uri,
        low=low,
        high=high,
        middle=round((low + high) / 2, 2),
        draws="another seed gives another image" if draws else "no; a photograph and a scale give one image",
        levels=", ".join(f"x{scale:g}" for scale in levels.values()),
        sha256=sha256,
        provenance=json.dumps(provenance, indent=1, ensure_ascii=False),
    )


def upload(repo: str, data: bytes, text: str, private: bool) -> None:
    """Put the file, and the card if there is none yet, into a repository, which is made if needed, in one commit.

    Raises:
        ImportError: without huggingface_hub.
        ValueError: the Hub refuses, or does not answer; the message says why.
    """
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError as error:
        raise ImportError(f"push_to_hub needs huggingface_hub: pip install huggingface_hub ({error})") from None
    api = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)  # None: as the owner's settings are
        if private and not api.repo_info(repo).private:
            raise ValueError("private=True, but the repository is there and public")
        files = [CommitOperationAdd(FILE, data)]
        if not api.file_exists(repo, CARD):
            files.append(CommitOperationAdd(CARD, text.encode()))
        api.create_commit(repo, files, commit_message=f"Upload {FILE} by degflow")
    except Exception as error:  # the client's, or those of its HTTP library, which its versions change
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        hint = "; is HF_TOKEN set, with write access?" if re.search(r"\b40[13]\b", str(error)) else ""
        raise ValueError(f"{repo}: not uploaded: {' '.join(lines[:2])}{hint}") from None
