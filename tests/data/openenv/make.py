"""Makes results.jsonl beside it, with openenv 0.10.0 itself: pip install openenv==0.10.0 && python make.py

A scripted policy guesses a number of 0 to 9 with a tool, or gives up in words. Each of four tasks is tried three times.
"""

import sys
from pathlib import Path

from openenv.core.env_server.mcp_types import Tool
from openenv.core.harness.collect import CollectRunner, RolloutSerializer
from openenv.core.harness.rollout import (
    HarnessRunLimits,
    MCPHarnessAdapter,
    ModelStepResult,
    ResourceSession,
    ResourceSessionFactory,
    ToolResult,
    VerifyResult,
)
from openenv.core.llm_client import LLMResponse, ToolCall

GUESS = Tool(
    name="guess",
    description="Guess the number.",
    input_schema={"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]},
)


class Session(ResourceSession):
    """One attempt at a secret number."""

    def __init__(self, secret):
        self.secret, self.reward = secret, 0.0

    def initial_messages(self):
        """Return the task."""
        return [{"role": "user", "content": f"Guess my number. It is {self.secret - 1} plus 1."}]

    def list_tools(self):
        """Return the one tool."""
        return [GUESS]

    def call_tool(self, name, arguments):  # noqa: ARG002
        """Answer a guess."""
        right = arguments["number"] == self.secret
        self.reward = float(right)
        return ToolResult(data="right" if right else "wrong", done=right)

    def verify(self, transcript, final_state=None):  # noqa: ARG002
        """Forward the reward."""
        return VerifyResult(env_reward=self.reward, done=True)

    def close(self):
        """Do nothing."""


class Factory(ResourceSessionFactory):
    """Makes sessions."""

    def create(self, task, seed=None, episode_id=None):  # noqa: ARG002
        """Return a session for a secret number."""
        return Session(task)


def policy(kind):
    """Return a scripted policy: 0 guesses right after a wrong guess, 1 guesses wrong, 2 says the answer."""

    def step(messages, tools, sampling):  # noqa: ARG001
        turn = sum(message["role"] == "assistant" for message in messages)
        secret = int(messages[0]["content"].split()[5]) + 1
        if kind == 2:
            return ModelStepResult(LLMResponse(content=f"It is {secret}.", tool_calls=[]))
        number = secret if kind == 0 and turn else secret + 1
        call = ToolCall(id=f"call_{turn}", name="guess", args={"number": number})
        if kind == 1 and turn:
            return ModelStepResult(LLMResponse(content="I give up.", tool_calls=[]))
        return ModelStepResult(LLMResponse(content="", tool_calls=[call]))

    return step


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    for kind in range(3):
        CollectRunner(
            session_factory=Factory(),
            harness_adapter=MCPHarnessAdapter(),
            serializer=RolloutSerializer(place),
            tasks=range(2, 6),
            limits=HarnessRunLimits(max_turns=4),
        ).run(model_step=policy(kind), num_episodes=4, episode_id_prefix=f"kind{kind}")
