from tests import shape_checker as shape_checker  # jaxtyping finds it as an attribute of this package
