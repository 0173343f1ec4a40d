import subprocess
import sys

from arrow_quant_v2 import store


def test_the_store_loads_no_torch() -> None:
    """And no pandas: whoever only lists a model waits for neither."""
    code = "import sys, arrow_quant_v2.store; print({'torch', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_front_door_offers_what_it_names() -> None:
    assert all(hasattr(store, name) for name in store.__all__)
    assert sorted(store.__all__) == store.__all__
