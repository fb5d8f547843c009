"""
A Hugging Face Space for a OneRec model: set ONEREC_MODEL to its folder or Hub id. ONEREC_ITEMS may name a table of item_id and title to show
in place of the one saved with the model.
"""

import os

from onerec_hf.cli.demo import DemoArguments
from onerec_hf.cli.demo_app import DemoRecommender, build_app
from onerec_hf.workflows import load_model, load_processor

name = os.environ.get("ONEREC_MODEL")
if not name:
    raise SystemExit("set ONEREC_MODEL: the folder or Hub id of a trained OneRec (in a Space: Settings, Variables)")
processor = load_processor("ONEREC_MODEL", name)
assert processor.catalogue is not None
items = DemoArguments(items=os.environ.get("ONEREC_ITEMS") or None).load(name, processor.catalogue)
recommender = DemoRecommender(load_model("ONEREC_MODEL", name), processor, items)
app = build_app(recommender, name=name.rstrip("/").split("/")[-1])

if __name__ == "__main__":
    app.launch()
