"""A page to drop a video on, and an HTTP API, over one `Pipeline`.

Needs the extra `web`: `pip install 'mfmjt[web]'`.
"""

from mfmjt.serve.settings import Settings

__all__ = ["Settings"]
