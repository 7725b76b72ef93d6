from tests import tiny
from vlv.models.hashing import weights_hash


def test_weights_hash_sees_names_and_values() -> None:
    one, same, other = tiny.make_vae(), tiny.make_vae(), tiny.make_vae(seed=8)
    assert weights_hash(one) == weights_hash(same) != weights_hash(other)
