-- format.lua: what a record says to a model: Alpaca's prompt, prompt and answer, a chat through the model's template, plain text,
-- or what a Lua function makes of it; as tokens of a stream, of which the answers are learned.
local lc = require "lolcats"
local files = require "lolcats.files"

local M = {}

local HEAD = "Below is an instruction that describes a task"
local TAIL = "Write a response that appropriately completes the request.\n\n### Instruction:\n"

--- Alpaca's prompt: with or without an input. Fields go in as they are.
function M.alpaca_prompt(record)
    local input = record.input
    if type(input) == "string" and input ~= "" then
        return HEAD .. ", paired with an input that provides further context. " .. TAIL .. record.instruction ..
               "\n\n### Input:\n" .. input .. "\n\n### Response:\n"
    end
    return HEAD .. ". " .. TAIL .. record.instruction .. "\n\n### Response:\n"
end

local ROLES = { human = "user", user = "user", gpt = "assistant", assistant = "assistant", system = "system", bot = "assistant",
                model = "assistant", tool = "tool" }

-- A message's content: a text, or parts {type = "text", text =}, joined.
local function text_of(content)
    if type(content) ~= "table" or content == files.null then return content end
    local parts = {}
    for i, part in ipairs(content) do
        if type(part) ~= "table" or part.type ~= "text" or type(part.text) ~= "string" then return nil end
        parts[i] = part.text
    end
    return table.concat(parts)
end

-- [{role =, content =}] from the two spellings in use.
local function messages_of(list, where)
    local out = {}
    for i, m in ipairs(list) do
        if type(m) ~= "table" or m == files.null then lc.fail("%s: message %d is no object", where, i) end
        local role, content = ROLES[m.role or m.from or ""], text_of(m.content or m.value)
        if not role or type(content) ~= "string" then
            lc.fail("%s: message %d needs role (user, assistant, system) and content", where, i)
        end
        out[i] = { role = role, content = content }
    end
    if #out == 0 then lc.fail("%s: a conversation without messages", where) end
    return out
end

local function has(record, name)
    local v = record[name]
    return v ~= nil and v ~= files.null
end

-- Kinds of records. Each adds one record to a stream.
local adders = {}

local function encode_prompt(how, text)
    if how.bos == nil then return how.tokenizer:encode(text, { special = true, parse = true }) end
    local ids = how.tokenizer:encode(text, { special = false, parse = true })
    if how.bos and ids[1] ~= how.bos then table.insert(ids, 1, how.bos) end
    return ids
end
local PLAIN = { special = false, parse = true }

local function add_pair(stream, how, prompt, answer)
    stream:add(encode_prompt(how, prompt), how.learn_prompts == true)
    stream:add(how.tokenizer:encode(answer .. how.eos, PLAIN), true)
end

local function text_field(record, name, where)
    local v = record[name]
    if type(v) ~= "string" then lc.fail("%s: the field '%s' is missing or no text", where, name) end
    return v
end

function adders.alpaca(stream, how, record, where)
    text_field(record, "instruction", where)
    add_pair(stream, how, M.alpaca_prompt(record), text_field(record, "output", where))
end

function adders.prompt(stream, how, record, where)
    add_pair(stream, how, text_field(record, "prompt", where),
             text_field(record, has(record, "completion") and "completion" or has(record, "response") and "response" or "answer", where))
end

function adders.text(stream, how, record, where)
    local ids = encode_prompt(how, text_field(record, "text", where))
    stream:add(ids, true)
    local eos = how.eos ~= "" and how.tokenizer:encode(how.eos, PLAIN) or {}
    if #eos == 1 and ids[#ids] ~= eos[1] then stream:add(eos, true) end
end

-- A conversation by the model's template. What the template writes for an assistant turn, beyond the opening that a prompt would
-- end with, is learned; the white space that follows its end token is not.
function adders.chat(stream, how, record, where)
    local messages = messages_of(has(record, "messages") and record.messages or has(record, "conversations") and record.conversations or record, where)
    local upto, done = {}, ""
    local function part(text, learn)
        if text ~= "" then stream:add(how.tokenizer:encode(text, PLAIN), learn or how.learn_prompts == true) end
    end
    for i, m in ipairs(messages) do
        if m.role == "assistant" then
            local open = how.render(upto, true)
            upto[i] = m
            local closed = how.render(upto, false)
            if open:sub(1, #done) ~= done or closed:sub(1, #open) ~= open then
                lc.fail("%s: the chat template does not write message %d after what stands before it; give the records as text", where, i)
            end
            part(open:sub(#done + 1), false)
            local reply, space = closed:sub(#open + 1):match "^(.-)(%s*)$"
            part(reply, true)
            part(space, false)
            done = closed
        else
            upto[i] = m
        end
    end
end

local function kind_of(record, where)
    if type(record) == "table" and record ~= files.null then
        if has(record, "instruction") then return "alpaca" end
        if has(record, "messages") or has(record, "conversations") then return "chat" end
        if has(record, "prompt") then return "prompt" end
        if has(record, "text") then return "text" end
        if type(record[1]) == "table" and (record[1].role or record[1].from) then return "chat" end
    end
    lc.fail("%s: a record has instruction and output (Alpaca), messages (chat), prompt and completion, or text; of other records " ..
            "format = function(record) makes one of these", where)
end

-- ---- one record ---------------------------------------------------------------------------------------------------
--- Adds a record to a stream. format: nil, by its fields; "alpaca", "chat", "prompt", "text"; or a function of the record that
--- returns a text, a record of these kinds, or nil to leave it out.
function M.add(stream, how, record, format, where, name)
    if type(format) == "function" then
        record, format = format(record), nil
        if record == nil then return end
    end
    if type(record) == "string" then record = { text = record } end
    local kind = format or kind_of(record, where)
    local add = adders[kind]
    if not add then lc.fail("format '%s': there are alpaca, chat, prompt, text, or a function", tostring(kind)) end
    if not how.eos then
        if kind == "alpaca" or kind == "prompt" then
            lc.fail("%s: what ends an answer is not known; give eos = \"</s>\" (the end token's text) or a model", name)
        end
        how.eos = ""
    end
    add(stream, how, record, where)
    if stream.mark then stream:mark() end
end

--- A piece of a plain text: the first one begins as the tokenizer begins a text.
function M.add_text(stream, how, text, is_first)
    stream:add(is_first and encode_prompt(how, text) or how.tokenizer:encode(text, PLAIN), true)
end

-- ---- how records become tokens ------------------------------------------------------------------------------------
local function bos_id(opts, tok)
    if opts.bos == nil or opts.bos == false then return opts.bos end
    local id = type(opts.bos) == "number" and opts.bos or tok:id(opts.bos)
    if not id then lc.fail("data: the tokenizer has no token '%s' (bos)", tostring(opts.bos)) end
    return id
end

--- From options (model, tokenizer, eos, bos, render, learn): {tokenizer, bos, eos, vocabulary, render}.
function M.resolve(opts)
    local model = opts.model
    local tok = opts.tokenizer or model and model.tokenizer
    if not tok then lc.fail("lc.data needs model = (one with a tokenizer) or tokenizer =") end
    if opts.learn ~= nil and opts.learn ~= "answers" and opts.learn ~= "all" then
        lc.fail("lc.data: learn is \"answers\" or \"all\", got %s", tostring(opts.learn))
    end
    local how = { tokenizer = tok, bos = bos_id(opts, tok), eos = opts.eos or model and model.special and model.special.eos_token,
                  vocabulary = model and model.config and model.config.vocab_size, learn_prompts = opts.learn == "all",
                  template_text = model and model.chat_template }
    how.render = opts.render or function(messages, generation)
        if not (model and model.chat_template) then
            lc.fail("these records are conversations, and the model has no chat template; give records with text, or a chat model")
        end
        how.template = how.template or require("lolcats.chat_template").compile(model.chat_template)
        local special = model.special or {}
        return how.template:render { messages = messages, add_generation_prompt = generation,
                                     bos_token = special.bos_token or "", eos_token = special.eos_token or "" }
    end
    return how
end

M.adders = adders
return M
