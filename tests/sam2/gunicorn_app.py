"""A web application as its author would write it, on a machine whose accelerator does not survive a fork.

GET /device/NAME: what ``omniops.device.pick`` says of the name in the worker. GET /remote: of the predictor's process.
"""

import json
import os

import pretended_mac  # noqa: F401 the machine

from omniops import device
from omniops.sam2 import remote

predictor = remote("a.pt", predictor="remote_standin:OnAMac")


def app(environ, start_response):
    answer = {"worker": os.getpid(), "in_forked_child": device.in_forked_child()}
    if environ["PATH_INFO"] == "/remote":
        answer["process"], answer["parent"] = predictor.process()
        picked, answer["process_in_forked_child"] = predictor.picked()
        answer["picked"] = str(picked)
        predictor.set_image([2.0])
        answer["predicted"] = predictor.predict().item()
    else:
        try:
            answer["picked"] = str(device.pick(environ["PATH_INFO"].rpartition("/")[2]))
        except ValueError as error:
            answer["error"] = str(error)
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]
