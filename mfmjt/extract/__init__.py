"""From folders of videos or sounds with captions to a feature store.

`tables` reads tables, `clips` cuts one file, `ends` are the networks that encode, and `work` makes
the store; `mfmjt extract` is all of it.
"""

__all__: list[str] = []
