"""A web application as its author would write it, on a machine whose accelerator does not survive a fork.

GET /device/NAME: what ``omniops.device.pick`` says of the name in the worker. GET /remote: of the predictor's process.
"""

import json
import os

import pretended_mac  # noqa: F401 the machine

from omniops import device
from omniops.sam2.remote_predictor import remote

predictor = remote("a.pt", predictor="remote_standin:OnAMac")


def app(environ, start_response):
    told = {"worker": os.getpid(), "in_forked_child": device.in_forked_child()}
    if environ["PATH_INFO"] == "/remote":
        told["process"], told["parent"] = predictor.process()
        picked, told["process_in_forked_child"] = predictor.picked()
        told["picked"] = str(picked)
        predictor.set_image([2.0])
        told["predicted"] = predictor.predict().item()
    else:
        try:
            told["picked"] = str(device.pick(environ["PATH_INFO"].rpartition("/")[2]))
        except ValueError as error:
            told["error"] = str(error)
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(told).encode()]
