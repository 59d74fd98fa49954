# SPDX-License-Identifier: Apache-2.0
"""A server on loopback that speaks as much S3 and GCS as the tests need, as a process of its own.

moto keeps the objects. What Google's store is asked for differs from S3 in two headers, so the same
server answers for both.
"""

import contextlib
import subprocess
import sys
import urllib.request

SERVE = """
import logging, sys
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

moto = DomainDispatcherApplication(create_backend_app)

def app(environ, start_response):
    # Google's name for "only where there is none".
    if environ.pop("HTTP_X_GOOG_IF_GENERATION_MATCH", None) == "0":
        environ["HTTP_IF_NONE_MATCH"] = "*"
    if "AWS" not in environ.get("HTTP_AUTHORIZATION", ""):
        scope = "Credential=k/20260101/us-east-1/s3/aws4_request"
        environ["HTTP_AUTHORIZATION"] = "AWS4-HMAC-SHA256 " + scope
    return moto(environ, start_response)

server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.server_port, flush=True)
import threading
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.stdin.read()
"""
KEY, SECRET = "AKIATESTTESTTEST", "not-a-secret-but-must-not-be-shown"


@contextlib.contextmanager
def running(*buckets):
    """Environment variables under which the server answers for s3:// and gs://."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin and process.stdout
    try:
        address = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        for bucket in buckets:
            request = urllib.request.Request(f"{address}/{bucket}", method="PUT")
            urllib.request.urlopen(request, timeout=10).close()
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "STORAGE_EMULATOR_HOST": address,
        }
    finally:
        process.kill()
        process.communicate()
