import inspect
import re

import pytest

from vlv import errors


def test_every_error_is_a_vlv_error_with_a_docstring():
    classes = [item for item in vars(errors).values() if inspect.isclass(item)]
    assert len(classes) == 14
    for item in classes:
        assert issubclass(item, errors.VLVError)
        assert item.__doc__


def test_the_drawn_tree_is_the_real_one():
    assert errors.__doc__
    parents = [errors.VLVError]
    for line in errors.__doc__.splitlines():
        found = re.match(r"([│ ]*)[├└]── (\w+)", line)
        if found:
            depth = len(found[1]) // 4
            child = getattr(errors, found[2])
            assert child.__bases__ == (parents[depth],)
            parents[depth + 1 :] = [child]


def test_an_image_error_is_caught_as_a_data_error():
    with pytest.raises(errors.DataError, match="broken"):
        raise errors.ImageError("broken")
