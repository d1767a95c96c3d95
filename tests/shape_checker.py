"""The type checker behind jaxtyping in the test run: beartype, which takes 1 for 1.0 as Python's own numbers do."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
