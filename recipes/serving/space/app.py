"""Show the page of a model: labels for a text, and why. `python app.py` starts it at http://127.0.0.1:7860."""

import os
import sys

from hf_xmc.cli import main

MODEL = os.environ.get("MODEL", "org/boats")  # a folder, or a model on the Hub
HOST = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1")
PORT = os.environ.get("GRADIO_SERVER_PORT", "7860")

os.environ["GRADIO_SSR_MODE"] = "False"  # a Space may turn it on; it needs a Node server next to this one
sys.exit(main(["serve", MODEL, "--host", HOST, "--port", PORT, "--name", "boats-page"]))
