"""The /graphql route: requests as JSON or, with files, as multipart forms; limits; the form of errors."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from flask import Request, Response
from graphql import GraphQLError, GraphQLSyntaxError, Lexer, Source, TokenKind
from strawberry.http.ides import get_graphql_ide_html
from strawberry.schema.exceptions import CannotGetOperationTypeError, InvalidOperationTypeError
from strawberry.types.graphql import OperationType

from omniops.server.errors import UNKNOWN_ERROR, ServerError

MAX_TOKENS = 1000
MAX_ALIASES = 16
MAX_DEPTH = 12  # of brackets; the deepest operation of the page needs 7

# Of an error that the official server has, too, and whose form is its own therefore: without extensions.
_OFFICIAL_WORDS = "Cannot find session ID"

_logger = logging.getLogger(__name__)


class _BadRequestError(Exception):
    """A request that is no GraphQL request; answered in plain text, as the official server answers it."""


def serve(schema: Any, request: Request, context: Any, debug: bool) -> Response:
    """The answer to a GET or POST of /graphql.

    Raises:
        ServerError: where the request is too large.
    """
    try:
        if request.method == "GET":
            return _graphiql(request, debug)
        query, variables, operation_name = _read(request)
    except _BadRequestError as error:
        return Response(str(error), 400, content_type="text/plain")
    try:
        _check_size(query)
    except GraphQLError as error:
        return _answer(None, [error])
    try:
        result = schema.execute_sync(
            query,
            variable_values=variables,
            operation_name=operation_name,
            context_value=context,
            allowed_operation_types=(OperationType.QUERY, OperationType.MUTATION),
        )
    except CannotGetOperationTypeError as error:
        return Response(error.as_http_error_reason(), 400, content_type="text/plain")
    except InvalidOperationTypeError as error:
        return Response(error.as_http_error_reason("POST"), 400, content_type="text/plain")
    return _answer(result.data, result.errors or [])


def _graphiql(request: Request, debug: bool) -> Response:
    """GraphiQL's page, which fetches its scripts from elsewhere and is for developers."""
    if "query" in request.args:
        raise _BadRequestError("queries are not allowed when using GET")
    if not debug or "text/html" not in request.headers.get("Accept", ""):
        raise ServerError("GraphQL requests are sent by POST", 404)
    response = Response(get_graphql_ide_html(graphql_ide="graphiql"), content_type="text/html; charset=utf-8")
    response.headers["Content-Security-Policy"] = "default-src 'self' 'unsafe-inline' https:; frame-ancestors 'none'"
    return response


def _read(request: Request) -> tuple[str, dict[str, Any] | None, str | None]:
    """The query, its variables and the operation's name."""
    if request.mimetype == "application/json":
        data = _parse(request.get_data(cache=False))
    elif request.mimetype == "multipart/form-data":
        data = _with_files(
            _parse(request.form.get("operations", "{}")), _parse(request.form.get("map", "{}")), request.files
        )
    else:
        raise _BadRequestError("Unsupported content type")
    if isinstance(data, list):
        raise _BadRequestError("Batching is not enabled")
    if not isinstance(data, dict):
        raise _BadRequestError("Unable to parse request body as JSON")
    query, variables, name = data.get("query"), data.get("variables"), data.get("operationName")
    if not isinstance(query, str) or not query.strip():
        raise _BadRequestError("No GraphQL query found in the request")
    if not isinstance(variables, dict | None):
        raise _BadRequestError("The GraphQL operation's `variables` must be an object or null, if provided.")
    if not isinstance(name, str | None):
        raise _BadRequestError("The GraphQL operation's `operationName` must be a string or null, if provided.")
    return query, variables, name


def _parse(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # what is not UTF-8 is a ValueError, too
        raise _BadRequestError("Unable to parse request body as JSON") from None


def _with_files(operations: Any, file_map: Any, files: Mapping[str, Any]) -> Any:
    """``operations`` with each file of the form at its paths, as the multipart request specification has it.

    The value that a file replaces does not matter: the specification has null, the official front end an object.
    """
    if not isinstance(file_map, dict) or not all(isinstance(paths, list) for paths in file_map.values()):
        raise _BadRequestError("The form's map must be an object of lists")
    for name, paths in file_map.items():
        if name not in files:
            raise _BadRequestError("File(s) missing in form data")
        for path in paths:
            *parents, last = str(path).split(".")
            target = operations
            for key in parents:
                target = target.get(key) if isinstance(target, dict) else None
            if not isinstance(target, dict) or not parents or parents[0] != "variables":
                raise _BadRequestError("The form's map names a place that is not among the variables")
            target[last] = files[name]
    return operations


def _check_size(query: str) -> None:
    """Refuses what is too long or too deep for the parser, before anything of it is parsed.

    Raises:
        GraphQLError: also for a character that is none of GraphQL's.
    """
    lexer = Lexer(Source(query))
    brackets: list[TokenKind] = []
    count = aliases = 0
    while (token := lexer.advance()).kind is not TokenKind.EOF:
        count += 1
        if token.kind in (TokenKind.BRACE_L, TokenKind.BRACKET_L, TokenKind.PAREN_L):
            brackets.append(token.kind)
        elif token.kind in (TokenKind.BRACE_R, TokenKind.BRACKET_R, TokenKind.PAREN_R) and brackets:
            brackets.pop()
        elif token.kind is TokenKind.COLON and TokenKind.PAREN_L not in brackets:  # else it is an argument's
            aliases += 1
        if count > MAX_TOKENS:
            raise GraphQLError(f"The query is too long: it has more than {MAX_TOKENS} tokens")
        if len(brackets) > MAX_DEPTH:
            raise GraphQLError(f"The query is nested too deeply: more than {MAX_DEPTH} levels")
        if aliases > MAX_ALIASES:
            raise GraphQLError(f"The query has more than {MAX_ALIASES} aliases")


def _answer(data: Any, errors: list[GraphQLError]) -> Response:
    """The official server's form: errors come with status 200."""
    body: dict[str, Any] = {"data": data}
    if errors:
        body["errors"] = [_formatted(error) for error in errors]
    return Response(json.dumps(body, separators=(",", ":")), content_type="application/json")


def _formatted(error: GraphQLError) -> dict[str, Any]:
    """The message, locations and path of an error; of one that nobody foresaw only that it happened."""
    cause = error.original_error
    while isinstance(cause, GraphQLError) and cause.original_error is not None:
        cause = cause.original_error
    formatted: dict[str, Any] = dict(error.formatted)
    formatted.pop("extensions", None)
    if isinstance(cause, ServerError):
        formatted["message"] = cause.message
        if cause.status != 400 and not cause.message.startswith(_OFFICIAL_WORDS):
            formatted["extensions"] = {"status": cause.status}
    elif isinstance(error, GraphQLSyntaxError) or cause is None or isinstance(cause, GraphQLError):
        pass  # GraphQL's own words about the query
    else:
        _logger.error("An operation failed", exc_info=cause)
        formatted["message"] = UNKNOWN_ERROR
    return formatted
