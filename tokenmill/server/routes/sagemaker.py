"""POST /invocations: the one route of Amazon SageMaker. The body's keys choose the API."""

from __future__ import annotations

from tokenmill.server import failures
from tokenmill.server.call import KEYS, Call
from tokenmill.server.routes.chat import answer_chat
from tokenmill.server.routes.completions import answer_completion
from tokenmill.server.routes.native import answer_compat
from tokenmill.server.schema.native import CompatRequest
from tokenmill.server.schema.openai import ChatRequest, CompletionRequest


async def sagemaker_compatibility(call: Call) -> None:
    """`inputs`: as POST `/`; `messages`: a chat; `prompt`: a completion. The first key that is present decides."""
    body = await call.decode(KEYS)
    if "inputs" in body:
        await answer_compat(call, await call.decode(CompatRequest))
    elif "messages" in body:
        call.dialect = "openai"
        await answer_chat(call, await call.decode(ChatRequest))
    elif "prompt" in body:
        call.dialect = "openai"
        await answer_completion(call, await call.decode(CompletionRequest))
    else:
        raise failures.BodyError(
            422,
            "Failed to deserialize the JSON body into the target type: data did not match any variant: "
            "expected `inputs` (generate), `messages` (chat) or `prompt` (completion)",
        )
