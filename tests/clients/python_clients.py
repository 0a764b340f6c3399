"""Client packages of Python against servers: python_clients.py CLIENT URL MODEL [URL MODEL ...].

Prints the package's version and, by model and task, "ok" or what went wrong. Runs in the environment of `make clients`,
which knows nothing of this project. The scripted model says what the user says, and behind a tool's result "The tool
said " and that; others may say anything of the form asked for.
"""

import asyncio
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

Task = Callable[[], None]
TOKENIZER = "checkpoints/smollm2-135m-instruct"  # what `make demo-model` leaves; any would do
CALL = '{"name": "get_weather", "parameters": {"city": "Rome"}}'
PLACE = '{"city": "Rome", "people": 3}'
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "Weather of a city", "parameters": CITY}
TOOL = {"type": "function", "function": FUNCTION}
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}


class Model:
    """The model behind the server: what it should have said."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name, self.is_scripted = url, name, name == "scripted"

    def check(self, text: str | None, said: str) -> None:
        assert text == said if self.is_scripted else text, f"said {text!r}"

    def check_place(self, text: str) -> None:
        place = json.loads(text)
        assert place.keys() == {"city", "people"} and isinstance(place["people"], int), text


def openai(model: Model) -> dict[str, Task]:
    import openai
    from pydantic import BaseModel

    client = openai.OpenAI(base_url=f"{model.url}/v1", api_key="key", max_retries=0)
    more = {"model": model.name, "max_tokens": 80}

    class Place(BaseModel):
        city: str
        people: int

    def user(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    def chat() -> None:
        model.check(client.chat.completions.create(messages=user("Hello"), **more).choices[0].message.content, "Hello")

    def stream() -> None:
        with client.chat.completions.stream(messages=user("Hello"), **more) as events:
            list(events)
            model.check(events.get_final_completion().choices[0].message.content, "Hello")

    def tools() -> None:
        asked = [{"role": "user", "content": "I say"}, *user(CALL)]
        choice = client.chat.completions.create(messages=asked, tools=[TOOL], tool_choice="required", **more).choices[0]
        [call] = choice.message.tool_calls
        assert call.function.name == "get_weather" and "city" in json.loads(call.function.arguments)
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        answer = client.chat.completions.create(messages=[*asked, choice.message, result], tools=[TOOL], **more)
        model.check(answer.choices[0].message.content, "The tool said sunny")

    def structured() -> None:
        parsed = client.chat.completions.parse(messages=user(PLACE), response_format=Place, **more)
        assert isinstance(parsed.choices[0].message.parsed, Place)

    def responses() -> None:
        answer = client.responses.create(model=model.name, input="Hello", max_output_tokens=80)
        model.check(answer.output_text, "Hello")
        with client.responses.stream(model=model.name, input="Hello", max_output_tokens=80) as events:
            kinds = [event.type for event in events]
        ends = {"response.completed"} if model.is_scripted else {"response.completed", "response.incomplete"}
        assert kinds[-1] in ends

    return {"chat": chat, "stream": stream, "tools": tools, "structured": structured, "responses": responses}


def cloudflare(model: Model) -> dict[str, Task]:
    import cloudflare

    client = cloudflare.Cloudflare(api_token="key", base_url=f"{model.url}/client/v4", max_retries=0, timeout=300)

    def run(**body: object) -> dict[str, object]:
        return client.ai.run(model.name, account_id="me", **body)

    def chat() -> None:
        model.check(run(messages=[{"role": "user", "content": "Hello"}], max_tokens=80)["response"], "Hello")
        model.check(run(prompt="Hello", max_tokens=80)["response"], "Hello")

    def tools() -> None:
        messages = [{"role": "user", "content": "I say"}, {"role": "user", "content": CALL}]
        [call] = run(messages=messages, tools=[FUNCTION], max_tokens=80, extra_body={"tool_choice": "required"})[
            "tool_calls"
        ]
        assert call["name"] == "get_weather" and "city" in call["arguments"]

    def structured() -> None:
        wanted = {"type": "json_schema", "json_schema": SCHEMA}
        answer = run(messages=[{"role": "user", "content": PLACE}], response_format=wanted, max_tokens=80)
        model.check_place(json.dumps(answer["response"]))

    return {"chat": chat, "tools": tools, "structured": structured}


def langchain_openai(model: Model) -> dict[str, Task]:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel

    class Place(BaseModel):
        city: str
        people: int

    llm = ChatOpenAI(model=model.name, base_url=f"{model.url}/v1", api_key="key", max_tokens=80, max_retries=0)

    def chat() -> None:
        model.check(llm.invoke("Hello").content, "Hello")

    def stream() -> None:
        model.check("".join(part.content for part in llm.stream("Hello")), "Hello")

    def tools() -> None:
        asked = [HumanMessage("I say"), HumanMessage(CALL)]
        answer = llm.bind_tools([TOOL], tool_choice="required").invoke(asked)
        [call] = answer.tool_calls
        assert call["name"] == "get_weather" and "city" in call["args"]
        result = ToolMessage("sunny", tool_call_id=call["id"])
        model.check(llm.bind_tools([TOOL]).invoke([*asked, answer, result]).content, "The tool said sunny")

    def structured() -> None:
        assert isinstance(llm.with_structured_output(Place).invoke(PLACE), Place)

    def responses() -> None:
        newer = ChatOpenAI(
            model=model.name, base_url=f"{model.url}/v1", api_key="key", use_responses_api=True, max_tokens=80
        )
        model.check(newer.invoke("Hello").text, "Hello")
        model.check("".join(part.text for part in newer.stream("Hello")), "Hello")

    return {"chat": chat, "stream": stream, "tools": tools, "structured": structured, "responses": responses}


def openai_agents(model: Model) -> dict[str, Task]:
    from agents import Agent, ModelSettings, Runner, function_tool, set_tracing_disabled
    from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel
    from agents.models.openai_responses import OpenAIResponsesModel
    from openai import AsyncOpenAI
    from pydantic import BaseModel

    set_tracing_disabled(True)

    class Place(BaseModel):
        city: str
        people: int

    @function_tool
    def get_weather(city: str) -> str:
        """Weather of a city."""
        return f"sunny in {city}"

    def ask(kind: type, text: str, *, stream: bool = False, settings: dict[str, object] | None = None, **more: object):
        client = AsyncOpenAI(base_url=f"{model.url}/v1", api_key="key", max_retries=0)
        wanted = ModelSettings(max_tokens=80, **(settings or {}))
        agent = Agent(name="a", model=kind(model=model.name, openai_client=client), model_settings=wanted, **more)

        async def run() -> object:
            told = [{"role": "user", "content": "I say"}, {"role": "user", "content": text}]
            if not stream:
                return (await Runner.run(agent, told)).final_output
            result = Runner.run_streamed(agent, told)
            async for _ in result.stream_events():
                pass
            return result.final_output

        return asyncio.run(run())

    def both(text: str, said: str, **more: object) -> None:
        for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
            model.check(ask(kind, text, **more), said)

    def tools() -> None:
        both(CALL, "The tool said sunny in Rome", tools=[get_weather], settings={"tool_choice": "required"})

    def structured() -> None:
        for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
            assert isinstance(ask(kind, PLACE, output_type=Place), Place)

    return {
        "chat": lambda: both("Hello", "Hello"),
        "stream": lambda: both("Hello", "Hello", stream=True),
        "tools": tools,
        "structured": structured,
    }


def litellm(model: Model) -> dict[str, Task]:
    import litellm

    litellm.suppress_debug_info = True
    more = {"model": f"hosted_vllm/{model.name}", "api_base": f"{model.url}/v1", "api_key": "key", "max_tokens": 80}

    def ask(*texts: str, **rest: object):
        return litellm.completion(messages=[{"role": "user", "content": text} for text in texts], **more, **rest)

    def chat() -> None:
        model.check(ask("Hello").choices[0].message.content, "Hello")

    def stream() -> None:
        parts = ask("Hello", stream=True, stream_options={"include_usage": True})
        model.check("".join(p.choices[0].delta.content or "" for p in parts if p.choices), "Hello")

    def tools() -> None:
        [call] = ask("I say", CALL, tools=[TOOL], tool_choice="required").choices[0].message.tool_calls
        assert call.function.name == "get_weather" and "city" in json.loads(call.function.arguments)

    def structured() -> None:
        model.check_place(ask(PLACE, response_format=FORMAT).choices[0].message.content)

    return {"chat": chat, "stream": stream, "tools": tools, "structured": structured}


def pydantic_ai_slim(model: Model) -> dict[str, Task]:
    from pydantic import BaseModel
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.messages import ModelRequest, UserPromptPart
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Place(BaseModel):
        city: str
        people: int

    def agent(kind: type = OpenAIChatModel, **more: object) -> "Agent":
        provider = OpenAIProvider(base_url=f"{model.url}/v1", api_key="key")
        return Agent(kind(model.name, provider=provider), model_settings={"max_tokens": 80}, **more)

    def stream() -> None:
        async def run() -> str:
            async with agent().run_stream("Hello") as result:
                return await result.get_output()

        model.check(asyncio.run(run()), "Hello")

    def structured() -> None:
        assert isinstance(agent(output_type=NativeOutput(Place)).run_sync(PLACE).output, Place)

    def tools() -> None:
        call = '{"name": "final_result", "parameters": {"city": "Rome", "people": 3}}'
        before = [ModelRequest(parts=[UserPromptPart("I say")])]  # the tools are told in the first message
        assert isinstance(agent(output_type=Place).run_sync(call, message_history=before).output, Place)

    return {
        "chat": lambda: model.check(agent().run_sync("Hello").output, "Hello"),
        "stream": stream,
        "tools": tools,
        "structured": structured,
        "responses": lambda: model.check(agent(OpenAIResponsesModel).run_sync("Hello").output, "Hello"),
    }


def instructor(model: Model) -> dict[str, Task]:
    import instructor
    import openai
    from pydantic import BaseModel

    class Place(BaseModel):
        city: str
        people: int

    def ask(mode: "instructor.Mode", text: str) -> None:
        client = openai.OpenAI(base_url=f"{model.url}/v1", api_key="key", max_retries=0)
        asked = [{"role": "user", "content": "I say"}, {"role": "user", "content": text}]
        made = instructor.from_openai(client, mode=mode).chat.completions.create(
            model=model.name, response_model=Place, messages=asked, max_tokens=80, max_retries=1
        )
        assert isinstance(made, Place)

    call = '{"name": "Place", "parameters": {"city": "Rome", "people": 3}}'
    return {
        "tools": lambda: ask(instructor.Mode.TOOLS, call),
        "structured": lambda: ask(instructor.Mode.JSON_SCHEMA, PLACE),
    }


def lm_eval(model: Model) -> dict[str, Task]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    more = {"model": model.name, "tokenizer_backend": None, "tokenized_requests": False, "max_retries": 1}

    def instances(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
        return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]

    def chat() -> None:
        lm = LocalChatCompletion(base_url=f"{model.url}/v1/chat/completions", **more)
        context = json.dumps([{"role": "user", "content": "Hello"}])
        from lm_eval.models.api_models import JsonChatStr

        asked = instances("generate_until", (JsonChatStr(context), {"until": ["Question:"], "max_gen_toks": 20}))
        model.check(lm.generate_until(asked, disable_tqdm=True)[0], "Hello")

    def completions() -> None:
        lm = LocalCompletionsAPI(base_url=f"{model.url}/v1/completions", **more)
        asked = instances("generate_until", ("Hello", {"until": ["\n\n\n"], "max_gen_toks": 5}))
        assert len(lm.generate_until(asked, disable_tqdm=True)) == 1

    return {"chat": chat, "completions": completions}


def vllm(model: Model) -> dict[str, Task]:
    """What `vllm bench serve` runs: the command itself stumbles over the name of the package for CPUs."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)

    def bench(backend: str, route: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            words = ["--backend", backend, "--endpoint", route, "--base-url", model.url, "--model", model.name]
            words += ["--tokenizer", TOKENIZER, "--dataset-name", "random", "--num-prompts", "6", "--seed", "1"]
            words += ["--random-input-len", "8", "--random-output-len", "8", "--save-result", "--save-detailed"]
            words += ["--result-dir", folder, "--result-filename", "result.json", "--disable-tqdm"]
            main(parser.parse_args(words))
            told = json.loads((Path(folder) / "result.json").read_text())
        assert told["completed"] == 6 and not any(told["errors"]), told["errors"]
        assert told["output_lens"] == [8] * 6 and all(told["ttfts"]) and all(told["generated_texts"]), str(told)[-300:]

    return {
        "stream": lambda: bench("openai-chat", "/v1/chat/completions"),
        "completions": lambda: bench("openai", "/v1/completions"),
    }


CLIENTS = [openai, cloudflare, langchain_openai, openai_agents, litellm, pydantic_ai_slim, instructor, lm_eval, vllm]


def version_of(name: str) -> str:
    try:
        return version(name.replace("_", "-"))
    except PackageNotFoundError:
        return version(f"{name}-cpu")


def main() -> None:
    name, *pairs = sys.argv[1:]
    [client] = [client for client in CLIENTS if client.__name__ == name]
    results = {}
    for url, model in zip(pairs[::2], pairs[1::2], strict=True):
        results[model] = told = {}
        for task, run in client(Model(url, model)).items():
            try:
                run()
                told[task] = "ok"
            except Exception as error:
                told[task] = f"{type(error).__name__}: {error}"[:400]
    print(json.dumps({"version": version_of(name), "models": results}))


if __name__ == "__main__":
    main()
