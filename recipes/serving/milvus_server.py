"""Serve a model whose labels are searched by Milvus.

python milvus_server.py MODEL --milvus http://localhost:19530

Several servers share a collection, which the first one fills. Its name holds a fingerprint of the label embeddings, so
that a new version of the model has a new one. Drop the old one when no server uses it.
"""

import argparse
import logging.config
import os

import uvicorn

from hf_xmc import MilvusIndex, XMCModel
from hf_xmc.cli import HelpFormatter
from hf_xmc.search.equal_rows import fingerprint
from hf_xmc.serving.app import create_app
from hf_xmc.serving.logs import log_config
from hf_xmc.serving.server import SECONDS_TO_FINISH, TOKEN
from hf_xmc.serving.settings import ServerSettings

logger = logging.getLogger("hf_xmc.milvus_server")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", help="folder of a saved model")
    parser.add_argument("--milvus", required=True, help="address of Milvus, or a file for milvus-lite")
    parser.add_argument("--name", default="model", help="name of the model, and prefix of its collection")
    parser.add_argument("--index_type", default="AUTOINDEX", help="index that Milvus builds")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    logging.config.dictConfig(log_config())

    model = XMCModel.from_pretrained(arguments.model)
    embeddings = model.index.embeddings
    collection = f"{arguments.name}_{fingerprint(embeddings.numpy()).hex()[:16]}"
    model.index = MilvusIndex(
        embeddings,
        arguments.milvus,
        collection,
        token=os.environ.get("MILVUS_TOKEN", ""),  # user:password, or an API key
        keep=True,
        index_type=arguments.index_type,
    )
    logger.info("Labels are searched in the collection %s of %s.", collection, arguments.milvus)
    settings = ServerSettings(name=arguments.name, token=os.environ.get(TOKEN) or None)
    app = create_app(model, settings, with_page=settings.token is None)
    options = {"log_config": log_config(), "access_log": False, "server_header": False}
    uvicorn.run(app, host=arguments.host, port=arguments.port, timeout_graceful_shutdown=SECONDS_TO_FINISH, **options)


if __name__ == "__main__":
    main()
