"""Public chat templates, and what each supervises of the same few conversations, written out by hand.

The answer at index i is asked for by P_i, the rendering of messages[:i] with the generation prompt.  Supervised is
what the template writes from there: what it puts before the words, the words, and the last control token that
closes the turn; no white space or header behind that token.  What a template writes behind any conversation
(Phi-3: <|endoftext|>) is supervised too, in a string of its own where something unsupervised stands before it.

A turn that the whole conversation writes differently from how it stands as the last turn (Qwen3 leaves the reasoning
out of earlier turns) becomes an example of its own, messages[:i+1] with that turn alone supervised; these examples
come first, in order, then the whole with the turns that stay as they are.

No cell was read off a program's output.  The templates are those that the models' authors publish, but for Vicuna's.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Template:
    """A published chat template, with the tokens of its tokenizer that matter to it."""

    name: str
    source: str
    jinja: str
    special: tuple[str, ...]  # control tokens, flagged special in the model's tokenizer
    end: str  # the control token that closes an assistant's turn
    added: tuple[str, ...] = ()  # added tokens that aren't flagged special
    bos: str = ""
    eos: str = ""


@dataclass(frozen=True)
class Conversation:
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Refused:
    """No example comes of it; `reason` is a word or two of why."""

    reason: str


def _system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


# A skin tone on its emoji, letters with their accents behind them (e + U+0301, n + U+0303), a flag of two code points.
KUMUSTA = "Kumusta ka na, Jose\u0301? 👋🏽 你好吗？"
MABUTI = "Mabuti naman, Nin\u0303o! 😀 Salamat — 我很好。🇵🇭"
FOUR = "<think>\nTwo and two.\n</think>\n\nFour."
SIX = "<think>\nThree and three.\n</think>\n\nSix."

GET_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name."}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Manila"}}}

CONVERSATIONS = {
    "system": Conversation([_system("Answer in one word."), _user("Capital of France?"), _assistant("Paris.")]),
    "multi_turn": Conversation(
        [_user("Name a fruit."), _assistant("Mango."), _user("And a tree?"), _assistant("Narra.")]
    ),
    "tools": Conversation(
        [
            _user("How warm is Manila?"),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call12345", "name": "get_weather", "content": "31 degrees"},
            _assistant("It is 31 degrees in Manila."),
        ],
        tools=[GET_WEATHER],
    ),
    "empty_system": Conversation([_system(""), _user("Say hello."), _assistant("Hello there.")]),
    "unicode": Conversation([_user(KUMUSTA), _assistant(MABUTI)]),
    "reasoning": Conversation([_user("2 + 2?"), _assistant(FOUR), _user("3 + 3?"), _assistant(SIX)]),
}


def control_text(template: Template) -> Conversation:
    """A conversation about the token that ends the template's own turns."""
    return Conversation([_user(f"What does {template.end} do?"), _assistant(f"{template.end} ends a turn.")])


TEMPLATES = (
    Template(
        name="smollm2",
        source="HuggingFaceTB/SmolLM2-135M-Instruct, tokenizer_config.json",
        jinja=(
            "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
            "{{ '<|im_start|>system\n"
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n"
            "' + message['content'] + '<|im_end|>' + '\n"
            "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
            "' }}{% endif %}"
        ),
        special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        end="<|im_end|>",
        bos="<|im_start|>",
        eos="<|im_end|>",
    ),
    Template(
        name="chatml",
        source="teknium/OpenHermes-2.5-Mistral-7B, tokenizer_config.json",
        jinja=(
            "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
            "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
            "{% endif %}"
        ),
        special=("<s>", "<|im_start|>", "<|im_end|>"),
        end="<|im_end|>",
        bos="<s>",
        eos="<|im_end|>",
    ),
    Template(
        name="llama-2-chat",
        source="meta-llama/Llama-2-7b-chat-hf, tokenizer_config.json",
        jinja=(
            "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
            "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
            "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
            "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
            "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
            "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
            "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
            "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
            "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
        ),
        special=("<s>", "</s>"),
        end="</s>",
        bos="<s>",
        eos="</s>",
    ),
    Template(
        name="llama-3-instruct",
        source="meta-llama/Meta-Llama-3-8B-Instruct, tokenizer_config.json",
        jinja=(
            "{% set loop_messages = messages %}{% for message in loop_messages %}"
            "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n"
            "\n"
            "'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
            "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n"
            "\n"
            "' }}{% endif %}"
        ),
        special=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        end="<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    Template(
        name="llama-3.2-instruct",
        source="meta-llama/Llama-3.2-3B-Instruct, tokenizer_config.json",
        jinja=(
            "{{- bos_token }}\n"
            "{%- if custom_tools is defined %}\n"
            "    {%- set tools = custom_tools %}\n"
            "{%- endif %}\n"
            "{%- if not tools_in_user_message is defined %}\n"
            "    {%- set tools_in_user_message = true %}\n"
            "{%- endif %}\n"
            "{%- if not date_string is defined %}\n"
            "    {%- if strftime_now is defined %}\n"
            '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
            "    {%- else %}\n"
            '        {%- set date_string = "26 Jul 2024" %}\n'
            "    {%- endif %}\n"
            "{%- endif %}\n"
            "{%- if not tools is defined %}\n"
            "    {%- set tools = none %}\n"
            "{%- endif %}\n"
            "\n"
            "{#- This block extracts the system message, so we can slot it into the right place. #}\n"
            "{%- if messages[0]['role'] == 'system' %}\n"
            "    {%- set system_message = messages[0]['content']|trim %}\n"
            "    {%- set messages = messages[1:] %}\n"
            "{%- else %}\n"
            '    {%- set system_message = "" %}\n'
            "{%- endif %}\n"
            "\n"
            "{#- System message #}\n"
            '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
            "{%- if tools is not none %}\n"
            '    {{- "Environment: ipython\\n" }}\n'
            "{%- endif %}\n"
            '{{- "Cutting Knowledge Date: December 2023\\n" }}\n'
            '{{- "Today Date: " + date_string + "\\n\\n" }}\n'
            "{%- if tools is not none and not tools_in_user_message %}\n"
            '    {{- "You have access to the following functions. To call a function, please respond with JSON '
            'for a function call." }}\n'
            '    {{- \'Respond in the format {"name": function name, "parameters": dictionary of argument name '
            "and its value}.' }}\n"
            '    {{- "Do not use variables.\\n\\n" }}\n'
            "    {%- for t in tools %}\n"
            "        {{- t | tojson(indent=4) }}\n"
            '        {{- "\\n\\n" }}\n'
            "    {%- endfor %}\n"
            "{%- endif %}\n"
            "{{- system_message }}\n"
            '{{- "<|eot_id|>" }}\n'
            "\n"
            "{#- Custom tools are passed in a user message with some extra guidance #}\n"
            "{%- if tools_in_user_message and not tools is none %}\n"
            "    {#- Extract the first user message so we can plug it in here #}\n"
            "    {%- if messages | length != 0 %}\n"
            "        {%- set first_user_message = messages[0]['content']|trim %}\n"
            "        {%- set messages = messages[1:] %}\n"
            "    {%- else %}\n"
            "        {{- raise_exception(\"Cannot put tools in the first user message when there's no first user "
            'message!") }}\n'
            "{%- endif %}\n"
            "    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}\n"
            '    {{- "Given the following functions, please respond with a JSON for a function call " }}\n'
            '    {{- "with its proper arguments that best answers the given prompt.\\n\\n" }}\n'
            '    {{- \'Respond in the format {"name": function name, "parameters": dictionary of argument name '
            "and its value}.' }}\n"
            '    {{- "Do not use variables.\\n\\n" }}\n'
            "    {%- for t in tools %}\n"
            "        {{- t | tojson(indent=4) }}\n"
            '        {{- "\\n\\n" }}\n'
            "    {%- endfor %}\n"
            '    {{- first_user_message + "<|eot_id|>"}}\n'
            "{%- endif %}\n"
            "\n"
            "{%- for message in messages %}\n"
            "    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}\n"
            "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | "
            "trim + '<|eot_id|>' }}\n"
            "    {%- elif 'tool_calls' in message %}\n"
            "        {%- if not message.tool_calls|length == 1 %}\n"
            '            {{- raise_exception("This model only supports single tool-calls at once!") }}\n'
            "        {%- endif %}\n"
            "        {%- set tool_call = message.tool_calls[0].function %}\n"
            "        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}\n"
            "        {{- '{\"name\": \"' + tool_call.name + '\", ' }}\n"
            "        {{- '\"parameters\": ' }}\n"
            "        {{- tool_call.arguments | tojson }}\n"
            '        {{- "}" }}\n'
            '        {{- "<|eot_id|>" }}\n'
            '    {%- elif message.role == "tool" or message.role == "ipython" %}\n'
            '        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}\n'
            "        {%- if message.content is mapping or message.content is iterable %}\n"
            "            {{- message.content | tojson }}\n"
            "        {%- else %}\n"
            "            {{- message.content }}\n"
            "        {%- endif %}\n"
            '        {{- "<|eot_id|>" }}\n'
            "    {%- endif %}\n"
            "{%- endfor %}\n"
            "{%- if add_generation_prompt %}\n"
            "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
            "{%- endif %}\n"
        ),
        special=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        end="<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    Template(
        name="qwen2.5-instruct",
        source="Qwen/Qwen2.5-7B-Instruct, tokenizer_config.json",
        jinja=(
            "{%- if tools %}\n"
            "    {{- '<|im_start|>system\\n' }}\n"
            "    {%- if messages[0]['role'] == 'system' %}\n"
            "        {{- messages[0]['content'] }}\n"
            "    {%- else %}\n"
            "        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}\n"
            "    {%- endif %}\n"
            '    {{- "\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user '
            'query.\\n\\nYou are provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}\n'
            "    {%- for tool in tools %}\n"
            '        {{- "\\n" }}\n'
            "        {{- tool | tojson }}\n"
            "    {%- endfor %}\n"
            '    {{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and '
            'arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, '
            '\\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n" }}\n'
            "{%- else %}\n"
            "    {%- if messages[0]['role'] == 'system' %}\n"
            "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
            "    {%- else %}\n"
            "        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
            "assistant.<|im_end|>\\n' }}\n"
            "    {%- endif %}\n"
            "{%- endif %}\n"
            "{%- for message in messages %}\n"
            '    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or '
            '(message.role == "assistant" and not message.tool_calls) %}\n'
            "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
            '    {%- elif message.role == "assistant" %}\n'
            "        {{- '<|im_start|>' + message.role }}\n"
            "        {%- if message.content %}\n"
            "            {{- '\\n' + message.content }}\n"
            "        {%- endif %}\n"
            "        {%- for tool_call in message.tool_calls %}\n"
            "            {%- if tool_call.function is defined %}\n"
            "                {%- set tool_call = tool_call.function %}\n"
            "            {%- endif %}\n"
            '            {{- \'\\n<tool_call>\\n{"name": "\' }}\n'
            "            {{- tool_call.name }}\n"
            '            {{- \'", "arguments": \' }}\n'
            "            {{- tool_call.arguments | tojson }}\n"
            "            {{- '}\\n</tool_call>' }}\n"
            "        {%- endfor %}\n"
            "        {{- '<|im_end|>\\n' }}\n"
            '    {%- elif message.role == "tool" %}\n'
            '        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}\n'
            "            {{- '<|im_start|>user' }}\n"
            "        {%- endif %}\n"
            "        {{- '\\n<tool_response>\\n' }}\n"
            "        {{- message.content }}\n"
            "        {{- '\\n</tool_response>' }}\n"
            '        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}\n'
            "            {{- '<|im_end|>\\n' }}\n"
            "        {%- endif %}\n"
            "    {%- endif %}\n"
            "{%- endfor %}\n"
            "{%- if add_generation_prompt %}\n"
            "    {{- '<|im_start|>assistant\\n' }}\n"
            "{%- endif %}\n"
        ),
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        end="<|im_end|>",
        added=("<tool_call>", "</tool_call>"),
        eos="<|im_end|>",
    ),
    Template(
        name="qwen3",
        source="Qwen/Qwen3-8B, tokenizer_config.json",
        jinja=(
            "{%- if tools %}\n"
            "    {{- '<|im_start|>system\\n' }}\n"
            "    {%- if messages[0].role == 'system' %}\n"
            "        {{- messages[0].content + '\\n\\n' }}\n"
            "    {%- endif %}\n"
            '    {{- "# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are '
            'provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}\n'
            "    {%- for tool in tools %}\n"
            '        {{- "\\n" }}\n'
            "        {{- tool | tojson }}\n"
            "    {%- endfor %}\n"
            '    {{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and '
            'arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, '
            '\\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n" }}\n'
            "{%- else %}\n"
            "    {%- if messages[0].role == 'system' %}\n"
            "        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n"
            "    {%- endif %}\n"
            "{%- endif %}\n"
            "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n"
            "{%- for message in messages[::-1] %}\n"
            "    {%- set index = (messages|length - 1) - loop.index0 %}\n"
            '    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and '
            "not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}\n"
            "        {%- set ns.multi_step_tool = false %}\n"
            "        {%- set ns.last_query_index = index %}\n"
            "    {%- endif %}\n"
            "{%- endfor %}\n"
            "{%- for message in messages %}\n"
            "    {%- if message.content is string %}\n"
            "        {%- set content = message.content %}\n"
            "    {%- else %}\n"
            "        {%- set content = '' %}\n"
            "    {%- endif %}\n"
            '    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}\n'
            "        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n"
            '    {%- elif message.role == "assistant" %}\n'
            "        {%- set reasoning_content = '' %}\n"
            "        {%- if message.reasoning_content is string %}\n"
            "            {%- set reasoning_content = message.reasoning_content %}\n"
            "        {%- else %}\n"
            "            {%- if '</think>' in content %}\n"
            "                {%- set reasoning_content = "
            "content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}\n"
            "                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
            "            {%- endif %}\n"
            "        {%- endif %}\n"
            "        {%- if loop.index0 > ns.last_query_index %}\n"
            "            {%- if loop.last or (not loop.last and reasoning_content) %}\n"
            "                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') "
            "+ '\\n</think>\\n\\n' + content.lstrip('\\n') }}\n"
            "            {%- else %}\n"
            "                {{- '<|im_start|>' + message.role + '\\n' + content }}\n"
            "            {%- endif %}\n"
            "        {%- else %}\n"
            "            {{- '<|im_start|>' + message.role + '\\n' + content }}\n"
            "        {%- endif %}\n"
            "        {%- if message.tool_calls %}\n"
            "            {%- for tool_call in message.tool_calls %}\n"
            "                {%- if (loop.first and content) or (not loop.first) %}\n"
            "                    {{- '\\n' }}\n"
            "                {%- endif %}\n"
            "                {%- if tool_call.function %}\n"
            "                    {%- set tool_call = tool_call.function %}\n"
            "                {%- endif %}\n"
            '                {{- \'<tool_call>\\n{"name": "\' }}\n'
            "                {{- tool_call.name }}\n"
            '                {{- \'", "arguments": \' }}\n'
            "                {%- if tool_call.arguments is string %}\n"
            "                    {{- tool_call.arguments }}\n"
            "                {%- else %}\n"
            "                    {{- tool_call.arguments | tojson }}\n"
            "                {%- endif %}\n"
            "                {{- '}\\n</tool_call>' }}\n"
            "            {%- endfor %}\n"
            "        {%- endif %}\n"
            "        {{- '<|im_end|>\\n' }}\n"
            '    {%- elif message.role == "tool" %}\n'
            '        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}\n'
            "            {{- '<|im_start|>user' }}\n"
            "        {%- endif %}\n"
            "        {{- '\\n<tool_response>\\n' }}\n"
            "        {{- content }}\n"
            "        {{- '\\n</tool_response>' }}\n"
            '        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}\n'
            "            {{- '<|im_end|>\\n' }}\n"
            "        {%- endif %}\n"
            "    {%- endif %}\n"
            "{%- endfor %}\n"
            "{%- if add_generation_prompt %}\n"
            "    {{- '<|im_start|>assistant\\n' }}\n"
            "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
            "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
            "    {%- endif %}\n"
            "{%- endif %}"
        ),
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        end="<|im_end|>",
        added=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
        eos="<|im_end|>",
    ),
    Template(
        name="gemma-2-it",
        source="google/gemma-2-2b-it, tokenizer_config.json",
        jinja=(
            "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
            "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
            "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
            "{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
            "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n"
            "' + message['content'] | trim + '<end_of_turn>\n"
            "' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n"
            "'}}{% endif %}"
        ),
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        end="<end_of_turn>",
        bos="<bos>",
        eos="<eos>",
    ),
    Template(
        name="mistral-7b-v0.1",
        source="mistralai/Mistral-7B-Instruct-v0.1, tokenizer_config.json",
        jinja=(
            "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == "
            "0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
            "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
            "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}{% else %}"
            "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
        ),
        special=("<s>", "</s>"),
        end="</s>",
        bos="<s>",
        eos="</s>",
    ),
    Template(
        name="mistral-nemo",
        source="mistralai/Mistral-Nemo-Instruct-2407, tokenizer_config.json",
        jinja=(
            '{%- if messages[0]["role"] == "system" %}\n'
            '    {%- set system_message = messages[0]["content"] %}\n'
            "    {%- set loop_messages = messages[1:] %}\n"
            "{%- else %}\n"
            "    {%- set loop_messages = messages %}\n"
            "{%- endif %}\n"
            "{%- if not tools is defined %}\n"
            "    {%- set tools = none %}\n"
            "{%- endif %}\n"
            '{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}\n'
            "\n"
            "{#- This block checks for alternating user/assistant messages, skipping tool calling messages #}\n"
            "{%- set ns = namespace() %}\n"
            "{%- set ns.index = 0 %}\n"
            "{%- for message in loop_messages %}\n"
            '    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls '
            "is defined and message.tool_calls is not none)) %}\n"
            '        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}\n'
            '            {{- raise_exception("After the optional system message, conversation roles must '
            'alternate user/assistant/user/assistant/...") }}\n'
            "        {%- endif %}\n"
            "        {%- set ns.index = ns.index + 1 %}\n"
            "    {%- endif %}\n"
            "{%- endfor %}\n"
            "\n"
            "{{- bos_token }}\n"
            "{%- for message in loop_messages %}\n"
            '    {%- if message["role"] == "user" %}\n'
            "        {%- if tools is not none and (message == user_messages[-1]) %}\n"
            '            {{- "[AVAILABLE_TOOLS][" }}\n'
            "            {%- for tool in tools %}\n"
            "                {%- set tool = tool.function %}\n"
            '                {{- \'{"type": "function", "function": {\' }}\n'
            '                {%- for key, val in tool.items() if key != "return" %}\n'
            "                    {%- if val is string %}\n"
            "                        {{- '\"' + key + '\": \"' + val + '\"' }}\n"
            "                    {%- else %}\n"
            "                        {{- '\"' + key + '\": ' + val|tojson }}\n"
            "                    {%- endif %}\n"
            "                    {%- if not loop.last %}\n"
            '                        {{- ", " }}\n'
            "                    {%- endif %}\n"
            "                {%- endfor %}\n"
            '                {{- "}}" }}\n'
            "                {%- if not loop.last %}\n"
            '                    {{- ", " }}\n'
            "                {%- else %}\n"
            '                    {{- "]" }}\n'
            "                {%- endif %}\n"
            "            {%- endfor %}\n"
            '            {{- "[/AVAILABLE_TOOLS]" }}\n'
            "            {%- endif %}\n"
            "        {%- if loop.last and system_message is defined %}\n"
            '            {{- "[INST]" + system_message + "\\n\\n" + message["content"] + "[/INST]" }}\n'
            "        {%- else %}\n"
            '            {{- "[INST]" + message["content"] + "[/INST]" }}\n'
            "        {%- endif %}\n"
            "    {%- elif (message.tool_calls is defined and message.tool_calls is not none) %}\n"
            '        {{- "[TOOL_CALLS][" }}\n'
            "        {%- for tool_call in message.tool_calls %}\n"
            "            {%- set out = tool_call.function|tojson %}\n"
            "            {{- out[:-1] }}\n"
            "            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}\n"
            '                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") '
            "}}\n"
            "            {%- endif %}\n"
            "            {{- ', \"id\": \"' + tool_call.id + '\"}' }}\n"
            "            {%- if not loop.last %}\n"
            '                {{- ", " }}\n'
            "            {%- else %}\n"
            '                {{- "]" + eos_token }}\n'
            "            {%- endif %}\n"
            "        {%- endfor %}\n"
            '    {%- elif message["role"] == "assistant" %}\n'
            '        {{- message["content"] + eos_token}}\n'
            '    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}\n'
            "        {%- if message.content is defined and message.content.content is defined %}\n"
            "            {%- set content = message.content.content %}\n"
            "        {%- else %}\n"
            "            {%- set content = message.content %}\n"
            "        {%- endif %}\n"
            '        {{- \'[TOOL_RESULTS]{"content": \' + content|string + ", " }}\n'
            "        {%- if not message.tool_call_id is defined or message.tool_call_id|length != 9 %}\n"
            '            {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}\n'
            "        {%- endif %}\n"
            "        {{- '\"call_id\": \"' + message.tool_call_id + '\"}[/TOOL_RESULTS]' }}\n"
            "    {%- else %}\n"
            '        {{- raise_exception("Only user and assistant roles are supported, with the exception of an '
            'initial optional system message!") }}\n'
            "    {%- endif %}\n"
            "{%- endfor %}\n"
        ),
        special=(
            "<s>",
            "</s>",
            "[INST]",
            "[/INST]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
            "[TOOL_CALLS]",
        ),
        end="</s>",
        bos="<s>",
        eos="</s>",
    ),
    Template(
        name="zephyr",
        source="HuggingFaceH4/zephyr-7b-beta and TinyLlama/TinyLlama-1.1B-Chat-v1.0, tokenizer_config.json",
        jinja=(
            "{% for message in messages %}\n"
            "{% if message['role'] == 'user' %}\n"
            "{{ '<|user|>\n"
            "' + message['content'] + eos_token }}\n"
            "{% elif message['role'] == 'system' %}\n"
            "{{ '<|system|>\n"
            "' + message['content'] + eos_token }}\n"
            "{% elif message['role'] == 'assistant' %}\n"
            "{{ '<|assistant|>\n"
            "'  + message['content'] + eos_token }}\n"
            "{% endif %}\n"
            "{% if loop.last and add_generation_prompt %}\n"
            "{{ '<|assistant|>' }}\n"
            "{% endif %}\n"
            "{% endfor %}"
        ),
        special=("<s>", "</s>"),
        end="</s>",
        bos="<s>",
        eos="</s>",
    ),
    Template(
        name="phi-3-mini",
        source="microsoft/Phi-3-mini-4k-instruct, tokenizer_config.json",
        jinja=(
            "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n"
            "' + message['content'] + '<|end|>\n"
            "'}}{% elif message['role'] == 'user' %}{{'<|user|>\n"
            "' + message['content'] + '<|end|>\n"
            "'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n"
            "' + message['content'] + '<|end|>\n"
            "'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n"
            "' }}{% else %}{{ eos_token }}{% endif %}"
        ),
        special=("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        end="<|end|>",
        bos="<s>",
        eos="<|endoftext|>",
    ),
    Template(
        name="phi-3-medium",
        source="microsoft/Phi-3-medium-4k-instruct, tokenizer_config.json",
        jinja=(
            "{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\n"
            "' + message['content'] + '<|end|>' + '\n"
            "' + '<|assistant|>' + '\n"
            "'}}{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n"
            "'}}{% endif %}{% endfor %}"
        ),
        special=("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        end="<|end|>",
        bos="<s>",
        eos="<|endoftext|>",
    ),
    Template(
        name="phi-3.5-mini",
        source="microsoft/Phi-3.5-mini-instruct, tokenizer_config.json",
        jinja=(
            "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
            "{{'<|system|>\n"
            "' + message['content'] + '<|end|>\n"
            "'}}{% elif message['role'] == 'user' %}{{'<|user|>\n"
            "' + message['content'] + '<|end|>\n"
            "'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n"
            "' + message['content'] + '<|end|>\n"
            "'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n"
            "' }}{% else %}{{ eos_token }}{% endif %}"
        ),
        special=("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        end="<|end|>",
        bos="<s>",
        eos="<|endoftext|>",
    ),
    Template(
        name="phi-4-mini",
        source="microsoft/Phi-4-mini-instruct, tokenizer_config.json",
        jinja=(
            "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
            "message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + "
            "message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}"
            "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
        ),
        special=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        end="<|end|>",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
    ),
    Template(
        name="phi-4",
        source="microsoft/phi-4, tokenizer_config.json as first published",
        jinja=(
            "{% for message in messages %}{% if (message['role'] == 'system') %}"
            "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}"
            "{% elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + message['content'] + "
            "'<|im_end|><|im_start|>assistant<|im_sep|>'}}{% elif (message['role'] == 'assistant') %}"
            "{{message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
        ),
        special=("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        end="<|im_end|>",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
    ),
    Template(
        name="deepseek-v2",
        source="deepseek-ai/DeepSeek-V2-Lite-Chat, tokenizer_config.json",
        jinja=(
            "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
            "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
            "{{ 'User: ' + message['content'] + '\n"
            "\n"
            "' }}{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
            "{% elif message['role'] == 'system' %}{{ message['content'] + '\n"
            "\n"
            "' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
        ),
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        end="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
    ),
    Template(
        name="deepseek-v2.5",
        source="deepseek-ai/DeepSeek-V2.5, tokenizer_config.json",
        jinja=(
            "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
            "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}"
            "{%- for message in messages %}    {%- if message['role'] == 'system' %}"
            "        {% set ns.system_prompt = message['content'] %}    {%- endif %}{%- endfor %}{{bos_token}}"
            "{{ns.system_prompt}}{%- for message in messages %}    {%- if message['role'] == 'user' %}"
            "    {%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}    {%- endif %}"
            "    {%- if message['role'] == 'assistant' and message['content'] is none %}"
            "        {%- set ns.is_tool = false -%}        {%- for tool in message['tool_calls']%}"
            "            {%- if not ns.is_first %}{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + "
            "tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + "
            "tool['function']['arguments'] + '\\n' + '```' + '<｜tool▁call▁end｜>'}}"
            "            {%- set ns.is_first = true -%}            {%- else %}"
            "{{'\\n' + '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + "
            "'\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' + '<｜tool▁call▁end｜>'}}"
            "{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}                   {%- endif %}        {%- endfor %}"
            "    {%- endif %}    {%- if message['role'] == 'assistant' and message['content'] is not none %}"
            "        {%- if ns.is_tool %}{{'<｜tool▁outputs▁end｜>' + message['content'] + "
            "'<｜end▁of▁sentence｜>'}}        {%- set ns.is_tool = false -%}        {%- else %}"
            "{{'<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}        {%- endif %}"
            "    {%- endif %}    {%- if message['role'] == 'tool' %}        {%- set ns.is_tool = true -%}"
            "        {%- if ns.is_output_first %}{{'<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + "
            "message['content'] + '<｜tool▁output▁end｜>'}}        {%- set ns.is_output_first = false %}"
            "        {%- else %}{{'\\n<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}"
            "        {%- endif %}    {%- endif %}{%- endfor -%}{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}"
            "{% endif %}{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}{% endif %}"
        ),
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        end="<｜end▁of▁sentence｜>",
        added=("<｜User｜>", "<｜Assistant｜>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
    ),
    Template(
        name="deepseek-r1-distill-first",
        source="deepseek-ai/DeepSeek-R1-Distill-Llama-8B, tokenizer_config.json as first published",
        jinja=(
            "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
            "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}"
            "{%- for message in messages %}{%- if message['role'] == 'system' %}"
            "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}"
            "{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}"
            "{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}"
            "{%- if message['role'] == 'assistant' and message['content'] is none %}{%- set ns.is_tool = false -%}"
            "{%- for tool in message['tool_calls']%}{%- if not ns.is_first %}"
            "{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + "
            "tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' "
            "+ '<｜tool▁call▁end｜>'}}{%- set ns.is_first = true -%}{%- else %}"
            "{{'\\n' + '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + "
            "'\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' + '<｜tool▁call▁end｜>'}}"
            "{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor %}{%- endif %}"
            "{%- if message['role'] == 'assistant' and message['content'] is not none %}{%- if ns.is_tool %}"
            "{{'<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}"
            "{%- set ns.is_tool = false -%}{%- else %}{% set content = message['content'] %}"
            "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
            "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endif %}"
            "{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}"
            "{{'<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}"
            "{%- set ns.is_output_first = false %}{%- else %}{{'\\n<｜tool▁output▁begin｜>' + message['content'] + "
            "'<｜tool▁output▁end｜>'}}{%- endif %}{%- endif %}{%- endfor -%}{% if ns.is_tool %}"
            "{{'<｜tool▁outputs▁end｜>'}}{% endif %}{% if add_generation_prompt and not ns.is_tool %}"
            "{{'<｜Assistant｜>'}}{% endif %}"
        ),
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        end="<｜end▁of▁sentence｜>",
        added=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
    ),
    Template(
        name="deepseek-r1-distill",
        source="deepseek-ai/DeepSeek-R1-Distill-Llama-8B, tokenizer_config.json",
        jinja=(
            "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
            "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}"
            "{%- for message in messages %}{%- if message['role'] == 'system' %}"
            "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}"
            "{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}"
            "{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}"
            "{%- if message['role'] == 'assistant' and message['content'] is none %}{%- set ns.is_tool = false -%}"
            "{%- for tool in message['tool_calls']%}{%- if not ns.is_first %}"
            "{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + "
            "tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' "
            "+ '<｜tool▁call▁end｜>'}}{%- set ns.is_first = true -%}{%- else %}"
            "{{'\\n' + '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + "
            "'\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' + '<｜tool▁call▁end｜>'}}"
            "{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor %}{%- endif %}"
            "{%- if message['role'] == 'assistant' and message['content'] is not none %}{%- if ns.is_tool %}"
            "{{'<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}"
            "{%- set ns.is_tool = false -%}{%- else %}{% set content = message['content'] %}"
            "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
            "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endif %}"
            "{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}"
            "{{'<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}"
            "{%- set ns.is_output_first = false %}{%- else %}{{'\\n<｜tool▁output▁begin｜>' + message['content'] + "
            "'<｜tool▁output▁end｜>'}}{%- endif %}{%- endif %}{%- endfor -%}{% if ns.is_tool %}"
            "{{'<｜tool▁outputs▁end｜>'}}{% endif %}{% if add_generation_prompt and not ns.is_tool %}"
            "{{'<｜Assistant｜><think>\\n'}}{% endif %}"
        ),
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        end="<｜end▁of▁sentence｜>",
        added=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
    ),
    Template(
        name="olmo-2",
        source="allenai/OLMo-2-1124-7B-Instruct, tokenizer_config.json",
        jinja=(
            "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n"
            "' + message['content'] + '\n"
            "' }}{% elif message['role'] == 'user' %}{{ '<|user|>\n"
            "' + message['content'] + '\n"
            "' }}{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\n"
            "'  + message['content'] + eos_token + '\n"
            "' }}{% else %}{{ '<|assistant|>\n"
            "'  + message['content'] + eos_token }}{% endif %}{% endif %}"
            "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n"
            "' }}{% endif %}{% endfor %}"
        ),
        special=("<|endoftext|>",),
        end="<|endoftext|>",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
    ),
    Template(
        name="granite-3.3",
        source="ibm-granite/granite-3.3-2b-instruct, tokenizer_config.json",
        jinja=(
            "{# Alias tools -> available_tools #}\n"
            "{%- if tools and not available_tools -%}\n"
            "    {%- set available_tools = tools -%}\n"
            "{%- endif -%}\n"
            "{%- if messages[0]['role'] == 'system' %}\n"
            "     {%- set system_message = messages[0]['content'] %}\n"
            "     {%- set loop_messages = messages[1:] %}\n"
            " {%- else %}\n"
            '     {%- set system_message = " Knowledge Cutoff Date: April 2024.\n'
            " Today's Date: \" + strftime_now('%B %d, %Y') + \". You are Granite, developed by IBM.\" %}\n"
            "     {%- if available_tools and documents %}\n"
            '         {%- set system_message = system_message + " You are a helpful assistant with access to the '
            "following tools. When a tool is required to answer the user's query, respond only with <|tool_call|> "
            "followed by a JSON list of tools used. If a tool does not exist in the provided list of tools, notify "
            "the user that you do not have the ability to fulfill the request. \n"
            "Write the response to the user's input by strictly aligning with the facts in the provided documents. "
            "If the information needed to answer the question is not available in the documents, inform the user "
            'that the question cannot be answered based on the available data." %}\n'
            "     {%- elif available_tools %}\n"
            '         {%- set system_message = system_message + " You are a helpful assistant with access to the '
            "following tools. When a tool is required to answer the user's query, respond only with <|tool_call|> "
            "followed by a JSON list of tools used. If a tool does not exist in the provided list of tools, notify "
            'the user that you do not have the ability to fulfill the request." %}\n'
            "     {%- elif documents %}\n"
            "         {%- set system_message = system_message + \" Write the response to the user's input by "
            "strictly aligning with the facts in the provided documents. If the information needed to answer the "
            "question is not available in the documents, inform the user that the question cannot be answered "
            'based on the available data." %}\n'
            "    {%- elif thinking %}\n"
            '    {%- set system_message = system_message + " You are a helpful AI assistant.\n'
            "Respond to every user query in a comprehensive and detailed way. You can write down your thoughts and "
            "reasoning process before responding. In the thought process, engage in a comprehensive cycle of "
            "analysis, summarization, exploration, reassessment, reflection, backtracing, and iteration to develop "
            "well-considered thinking process. In the response section, based on various attempts, explorations, "
            "and reflections from the thoughts section, systematically present the final solution that you deem "
            "correct. The response should summarize the thought process. Write your thoughts between "
            '<think></think> and write your response between <response></response> for each user query." %}\n'
            "     {%- else %}\n"
            '         {%- set system_message = system_message + " You are a helpful AI assistant." %}\n'
            "     {%- endif %}\n"
            "     {%- if 'citations' in controls and documents %}\n"
            "         {%- set system_message = system_message + ' \n"
            "Use the symbols <|start_of_cite|> and <|end_of_cite|> to indicate when a fact comes from a document "
            "in the search result, e.g <|start_of_cite|> {document_id: 1}my fact <|end_of_cite|> for a fact from "
            "document 1. Afterwards, list all the citations with their corresponding documents in an ordered "
            "list.' %}\n"
            "     {%- endif %}\n"
            "     {%- if 'hallucinations' in controls and documents %}\n"
            "         {%- set system_message = system_message + ' \n"
            "Finally, after the response is written, include a numbered list of sentences from the response with a "
            "corresponding risk value that are hallucinated and not based in the documents.' %}\n"
            "     {%- endif %}\n"
            "     {%- set loop_messages = messages %}\n"
            " {%- endif %}\n"
            " {{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\n"
            "' }}\n"
            " {%- if available_tools %}\n"
            "     {{- '<|start_of_role|>available_tools<|end_of_role|>' }}\n"
            "     {{- available_tools | tojson(indent=4) }}\n"
            "     {{- '<|end_of_text|>\n"
            "' }}\n"
            " {%- endif %}\n"
            " {%- if documents %}\n"
            "     {%- for document in documents %}\n"
            "         {{- '<|start_of_role|>document {\"document_id\": \"' + document['doc_id'] | string + "
            "'\"}<|end_of_role|>\n"
            "' }}\n"
            "         {{- document['text'] }}\n"
            "         {{- '<|end_of_text|>\n"
            "' }}\n"
            "              {%- endfor %}\n"
            " {%- endif %}\n"
            " {%- for message in loop_messages %}\n"
            "     {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + "
            "'<|end_of_text|>\n"
            "' }}\n"
            "     {%- if loop.last and add_generation_prompt %}\n"
            "         {{- '<|start_of_role|>assistant' }}\n"
            "             {%- if controls %}\n"
            "                 {{- ' ' + controls | tojson()}}\n"
            "             {%- endif %}\n"
            "         {{- '<|end_of_role|>' }}\n"
            "     {%- endif %}\n"
            " {%- endfor %}"
        ),
        special=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"),
        end="<|end_of_text|>",
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
    ),
    Template(
        name="vicuna",
        source="eachadea/vicuna-13b-1.1; it ships none, this is the one that llama.cpp's tests give it",
        jinja=(
            "{%- for message in messages %}{%- if message['role'] == 'system' -%}{{- '' + message['content'] + '\n"
            "\n"
            "' -}}{%- else -%}{%- if message['role'] == 'user' -%}{{-'USER: ' + message['content'] + '\n"
            "'-}}{%- else -%}{{-'ASSISTANT: ' + message['content'] + '</s>\n"
            "' -}}{%- endif -%}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{-'ASSISTANT:'-}}"
            "{%- endif -%}"
        ),
        special=("<s>", "</s>"),
        end="</s>",
        bos="<s>",
        eos="</s>",
    ),
)

Cells = dict[str, list[list[str]] | Refused]

_CELLS: dict[str, Cells] = {
    "smollm2": {
        "system": [["Paris.<|im_end|>"]],
        "multi_turn": [["Mango.<|im_end|>", "Narra.<|im_end|>"]],
        "tools": Refused("tools"),
        "empty_system": [["Hello there.<|im_end|>"]],
        "unicode": [[MABUTI + "<|im_end|>"]],
        "reasoning": [[FOUR + "<|im_end|>", SIX + "<|im_end|>"]],
        "control_text": [["<|im_end|> ends a turn.<|im_end|>"]],
    },
    "chatml": {
        "system": [["Paris.<|im_end|>"]],
        "multi_turn": [["Mango.<|im_end|>", "Narra.<|im_end|>"]],
        "tools": Refused("tools"),
        "empty_system": [["Hello there.<|im_end|>"]],
        "unicode": [[MABUTI + "<|im_end|>"]],
        "reasoning": [[FOUR + "<|im_end|>", SIX + "<|im_end|>"]],
        "control_text": [["<|im_end|> ends a turn.<|im_end|>"]],
    },
    "llama-2-chat": {  # "[INST] … [/INST]" is the prompt, with or without the generation prompt
        "system": [[" Paris. </s>"]],
        "multi_turn": [[" Mango. </s>", " Narra. </s>"]],
        "tools": Refused("alternate"),
        "empty_system": [[" Hello there. </s>"]],
        "unicode": [[" " + MABUTI + " </s>"]],
        "reasoning": [[" " + FOUR + " </s>", " " + SIX + " </s>"]],
        "control_text": [[" </s> ends a turn. </s>"]],
    },
    "llama-3-instruct": {
        "system": [["Paris.<|eot_id|>"]],
        "multi_turn": [["Mango.<|eot_id|>", "Narra.<|eot_id|>"]],
        "tools": Refused("tools"),
        "empty_system": [["Hello there.<|eot_id|>"]],
        "unicode": [[MABUTI + "<|eot_id|>"]],
        "reasoning": [[FOUR + "<|eot_id|>", SIX + "<|eot_id|>"]],
        "control_text": [["<|eot_id|> ends a turn.<|eot_id|>"]],
    },
    "llama-3.2-instruct": {
        "system": [["Paris.<|eot_id|>"]],
        "multi_turn": [["Mango.<|eot_id|>", "Narra.<|eot_id|>"]],
        "tools": [
            [
                '{"name": "get_weather", "parameters": {"city": "Manila"}}<|eot_id|>',
                "It is 31 degrees in Manila.<|eot_id|>",
            ]
        ],
        "empty_system": [["Hello there.<|eot_id|>"]],
        "unicode": [[MABUTI + "<|eot_id|>"]],
        "reasoning": [[FOUR + "<|eot_id|>", SIX + "<|eot_id|>"]],
        "control_text": [["<|eot_id|> ends a turn.<|eot_id|>"]],
    },
    "qwen2.5-instruct": {
        "system": [["Paris.<|im_end|>"]],
        "multi_turn": [["Mango.<|im_end|>", "Narra.<|im_end|>"]],
        "tools": [
            [
                '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Manila"}}\n</tool_call><|im_end|>',
                "It is 31 degrees in Manila.<|im_end|>",
            ]
        ],
        "empty_system": [["Hello there.<|im_end|>"]],
        "unicode": [[MABUTI + "<|im_end|>"]],
        "reasoning": [[FOUR + "<|im_end|>", SIX + "<|im_end|>"]],
        "control_text": [["<|im_end|> ends a turn.<|im_end|>"]],
    },
    "qwen3": {  # a last turn has a think block, be it empty; a turn before the last question has none
        "system": [["<think>\n\n</think>\n\nParis.<|im_end|>"]],
        "multi_turn": [
            ["<think>\n\n</think>\n\nMango.<|im_end|>"],
            ["<think>\n\n</think>\n\nNarra.<|im_end|>"],
        ],
        "tools": [
            [
                "<think>\n\n</think>\n\n<tool_call>\n"
                '{"name": "get_weather", "arguments": {"city": "Manila"}}\n</tool_call><|im_end|>'
            ],
            ["<think>\n\n</think>\n\nIt is 31 degrees in Manila.<|im_end|>"],
        ],
        "empty_system": [["<think>\n\n</think>\n\nHello there.<|im_end|>"]],
        "unicode": [["<think>\n\n</think>\n\n" + MABUTI + "<|im_end|>"]],
        "reasoning": [[FOUR + "<|im_end|>"], [SIX + "<|im_end|>"]],
        "control_text": [["<think>\n\n</think>\n\n<|im_end|> ends a turn.<|im_end|>"]],
    },
    "gemma-2-it": {
        "system": Refused("System role not supported"),
        "multi_turn": [["Mango.<end_of_turn>", "Narra.<end_of_turn>"]],
        "tools": Refused("alternate"),
        "empty_system": Refused("System role not supported"),
        "unicode": [[MABUTI + "<end_of_turn>"]],
        "reasoning": [[FOUR + "<end_of_turn>", SIX + "<end_of_turn>"]],
        "control_text": [["<end_of_turn> ends a turn.<end_of_turn>"]],
    },
    "mistral-7b-v0.1": {  # a space follows each </s>
        "system": Refused("alternate"),
        "multi_turn": [["Mango.</s>", "Narra.</s>"]],
        "tools": Refused("alternate"),
        "empty_system": Refused("alternate"),
        "unicode": [[MABUTI + "</s>"]],
        "reasoning": [[FOUR + "</s>", SIX + "</s>"]],
        "control_text": [["</s> ends a turn.</s>"]],
    },
    "mistral-nemo": {  # the system text goes before a question that comes last, so it's gone once that is answered
        "system": Refused("prompt"),
        "multi_turn": [["Mango.</s>", "Narra.</s>"]],
        "tools": [
            [
                '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Manila"}, "id": "call12345"}]</s>',
                "It is 31 degrees in Manila.</s>",
            ]
        ],
        "empty_system": Refused("prompt"),  # "[INST]\n\nSay hello." asks, "[INST]Say hello." stands before the answer
        "unicode": [[MABUTI + "</s>"]],
        "reasoning": [[FOUR + "</s>", SIX + "</s>"]],
        "control_text": [["</s> ends a turn.</s>"]],
    },
    "zephyr": {
        "system": [["Paris.</s>"]],
        "multi_turn": [["Mango.</s>", "Narra.</s>"]],
        "tools": Refused("tools"),
        "empty_system": [["Hello there.</s>"]],
        "unicode": [[MABUTI + "</s>"]],
        "reasoning": [[FOUR + "</s>", SIX + "</s>"]],
        "control_text": [["</s> ends a turn.</s>"]],
    },
    "phi-3-mini": {  # "\n" stands between <|end|> and <|endoftext|>
        "system": [["Paris.<|end|>", "<|endoftext|>"]],
        "multi_turn": [["Mango.<|end|>", "Narra.<|end|>", "<|endoftext|>"]],
        "tools": Refused("tools"),
        "empty_system": [["Hello there.<|end|>", "<|endoftext|>"]],
        "unicode": [[MABUTI + "<|end|>", "<|endoftext|>"]],
        "reasoning": [[FOUR + "<|end|>", SIX + "<|end|>", "<|endoftext|>"]],
        "control_text": [["<|end|> ends a turn.<|end|>", "<|endoftext|>"]],
    },
    "phi-3-medium": {  # writes the answer's header with the question, and nothing behind the conversation
        "system": Refused("system"),
        "multi_turn": [["Mango.<|end|>", "Narra.<|end|>"]],
        "tools": Refused("tools"),
        "empty_system": [["Hello there.<|end|>"]],
        "unicode": [[MABUTI + "<|end|>"]],
        "reasoning": [[FOUR + "<|end|>", SIX + "<|end|>"]],
        "control_text": [["<|end|> ends a turn.<|end|>"]],
    },
    "phi-3.5-mini": {
        "system": [["Paris.<|end|>", "<|endoftext|>"]],
        "multi_turn": [["Mango.<|end|>", "Narra.<|end|>", "<|endoftext|>"]],
        "tools": Refused("tools"),
        "empty_system": [["Hello there.<|end|>", "<|endoftext|>"]],
        "unicode": [[MABUTI + "<|end|>", "<|endoftext|>"]],
        "reasoning": [[FOUR + "<|end|>", SIX + "<|end|>", "<|endoftext|>"]],
        "control_text": [["<|end|> ends a turn.<|end|>", "<|endoftext|>"]],
    },
    "phi-4-mini": {  # nothing stands between <|end|> and <|endoftext|>
        "system": [["Paris.<|end|><|endoftext|>"]],
        "multi_turn": [["Mango.<|end|>", "Narra.<|end|><|endoftext|>"]],
        "tools": Refused("tools"),  # it looks for them in the system message
        "empty_system": [["Hello there.<|end|><|endoftext|>"]],
        "unicode": [[MABUTI + "<|end|><|endoftext|>"]],
        "reasoning": [[FOUR + "<|end|>", SIX + "<|end|><|endoftext|>"]],
        "control_text": [["<|end|> ends a turn.<|end|><|endoftext|>"]],
    },
    "phi-4": {
        "system": [["Paris.<|im_end|>"]],
        "multi_turn": [["Mango.<|im_end|>", "Narra.<|im_end|>"]],
        "tools": Refused("tools"),
        "empty_system": [["Hello there.<|im_end|>"]],
        "unicode": [[MABUTI + "<|im_end|>"]],
        "reasoning": [[FOUR + "<|im_end|>", SIX + "<|im_end|>"]],
        "control_text": [["<|im_end|> ends a turn.<|im_end|>"]],
    },
    "deepseek-v2": {  # "Assistant:" asks, "Assistant: " stands before the answer
        "system": [[" Paris.<｜end▁of▁sentence｜>"]],
        "multi_turn": [[" Mango.<｜end▁of▁sentence｜>", " Narra.<｜end▁of▁sentence｜>"]],
        "tools": Refused("tools"),
        "empty_system": [[" Hello there.<｜end▁of▁sentence｜>"]],
        "unicode": [[" " + MABUTI + "<｜end▁of▁sentence｜>"]],
        "reasoning": [[" " + FOUR + "<｜end▁of▁sentence｜>", " " + SIX + "<｜end▁of▁sentence｜>"]],
        "control_text": [[" <｜end▁of▁sentence｜> ends a turn.<｜end▁of▁sentence｜>"]],
    },
    "deepseek-v2.5": {
        "system": [["Paris.<｜end▁of▁sentence｜>"]],
        "multi_turn": [["Mango.<｜end▁of▁sentence｜>", "Narra.<｜end▁of▁sentence｜>"]],
        "tools": Refused("tools"),  # and a call is written only where the content is none
        "empty_system": [["Hello there.<｜end▁of▁sentence｜>"]],
        "unicode": [[MABUTI + "<｜end▁of▁sentence｜>"]],
        "reasoning": [[FOUR + "<｜end▁of▁sentence｜>", SIX + "<｜end▁of▁sentence｜>"]],
        "control_text": [["<｜end▁of▁sentence｜> ends a turn.<｜end▁of▁sentence｜>"]],
    },
    "deepseek-r1-distill-first": {  # drops what stands before </think> from every turn, the last one too
        "system": [["Paris.<｜end▁of▁sentence｜>"]],
        "multi_turn": [["Mango.<｜end▁of▁sentence｜>", "Narra.<｜end▁of▁sentence｜>"]],
        "tools": Refused("tools"),
        "empty_system": [["Hello there.<｜end▁of▁sentence｜>"]],
        "unicode": [[MABUTI + "<｜end▁of▁sentence｜>"]],
        "reasoning": Refused("message"),
        "control_text": [["<｜end▁of▁sentence｜> ends a turn.<｜end▁of▁sentence｜>"]],
    },
    "deepseek-r1-distill": {  # asks with "<｜Assistant｜><think>\n", and never writes an answer behind that
        "system": Refused("prompt"),
        "multi_turn": Refused("prompt"),
        "tools": Refused("tools"),
        "empty_system": Refused("prompt"),
        "unicode": Refused("prompt"),
        "reasoning": Refused("prompt"),
        "control_text": Refused("prompt"),
    },
    "olmo-2": {  # a newline follows the closing token of every turn but the last
        "system": [["Paris.<|endoftext|>"]],
        "multi_turn": [["Mango.<|endoftext|>", "Narra.<|endoftext|>"]],
        "tools": Refused("tools"),
        "empty_system": [["Hello there.<|endoftext|>"]],
        "unicode": [[MABUTI + "<|endoftext|>"]],
        "reasoning": [[FOUR + "<|endoftext|>", SIX + "<|endoftext|>"]],
        "control_text": [["<|endoftext|> ends a turn.<|endoftext|>"]],
    },
    "granite-3.3": {
        "system": [["Paris.<|end_of_text|>"]],
        "multi_turn": [["Mango.<|end_of_text|>", "Narra.<|end_of_text|>"]],
        "tools": Refused("tool"),  # writes the tools and the tool's answer, and leaves the call out
        "empty_system": [["Hello there.<|end_of_text|>"]],
        "unicode": [[MABUTI + "<|end_of_text|>"]],
        "reasoning": [[FOUR + "<|end_of_text|>", SIX + "<|end_of_text|>"]],
        "control_text": [["<|end_of_text|> ends a turn.<|end_of_text|>"]],
    },
    "vicuna": {  # "ASSISTANT:" asks, "ASSISTANT: " stands before the answer
        "system": [[" Paris.</s>"]],
        "multi_turn": [[" Mango.</s>", " Narra.</s>"]],
        "tools": Refused("tools"),
        "empty_system": [[" Hello there.</s>"]],
        "unicode": [[" " + MABUTI + "</s>"]],
        "reasoning": [[" " + FOUR + "</s>", " " + SIX + "</s>"]],
        "control_text": [[" </s> ends a turn.</s>"]],
    },
}

EXPECTED: dict[tuple[str, str], list[list[str]] | Refused] = {
    (template, conversation): cell for template, cells in _CELLS.items() for conversation, cell in cells.items()
}
