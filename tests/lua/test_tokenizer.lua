-- test_tokenizer.lua: tokenizers as Lua sees them: files of every kind opened by name, options and what stands in the
-- files beside them, equal ids by different files of one model, streams. Ids of real models are compared in
-- tests/golden.
local t = dofile((arg and arg[0] or ""):match("^(.*/)") .. "harness.lua")
local lc = require "lolcats"
local files = require "lolcats.files"

local TEXTS = {"", " ", "Hello world", "  two  spaces ", "naïve café 東京 \240\159\152\128 e\204\129",
               "don't 1234567\r\n\n\tx",
               "def f(x):\n    return x + 1\n", "<s>[INST] a </s>", ("word "):rep(500)}

local function joined(ids) return table.concat(ids, " ") end
local function plain(tok, text) return joined(tok:encode(text, {special = false, parse = false})) end

local function folder(name)
  local path = os.tmpname()
  os.remove(path)
  files.make_dirs(path .. "/" .. name)
  return path .. "/" .. name
end

local function copy(from, to) files.write(to, files.read(from)) end

local llama2 = t.data "assets/tokenizers/llama2/tokenizer.model"
local llama3 = t.data "assets/tokenizers/llama3/tokenizer.model"
local llama3_json = t.data "assets/tokenizers/llama3-hf/tokenizer.json"
local mistral = t.data "assets/tokenizers/mistral-v1/tokenizer.model.v1"
local mistral_json = t.data "assets/tokenizers/mistral-v1-hf/tokenizer.json"
local smollm2 = t.data "assets/tokenizers/smollm2/tokenizer.json"

if llama2 and mistral and mistral_json then
  t.test("a SentencePiece model, both ways", function()
    local hf, own = lc.tokenizer(llama2), lc.tokenizer(llama2, {style = "sentencepiece"})
    for _, text in ipairs(TEXTS) do t.eq(plain(hf, text), plain(own, text), text) end
    t.eq(joined(hf:encode "<s>a"), "1 1 263")
    t.eq(joined(own:encode("<s>a", {parse = false})), "1 529 29879 29958 29874")
    t.eq(hf:decode {1, 263}, "<s> a")
    t.eq(own:decode {1, 263}, "a")
    t.ok(hf:is_special(1) and own:is_special(1))
  end)
  t.test("a SentencePiece model has the ids of its tokenizer.json", function()
    local model, json = lc.tokenizer(mistral), lc.tokenizer(mistral_json)
    t.eq(model.size, json.size)
    for _, text in ipairs(TEXTS) do
      t.eq(joined(model:encode(text)), joined(json:encode(text)), text)
      t.eq(model:decode(model:encode(text)), json:decode(json:encode(text)), text)
    end
  end)
  t.test("tokens and switches from the files beside a tokenizer.model", function()
    local dir = folder "llama"
    copy(llama2, dir .. "/tokenizer.model")
    files.write_json(dir .. "/added_tokens.json", {["<|im_end|>"] = 32001, ["<|im_start|>"] = 32000})
    files.write_json(dir .. "/tokenizer_config.json", {add_bos_token = false, add_eos_token = true,
                                                       added_tokens_decoder = {
      ["32001"] = {content = "<|im_end|>", special = true, rstrip = true, normalized = false}}})
    local tok = lc.tokenizer(dir)
    t.eq(tok.size, 32002)
    t.eq(joined(tok:encode "<|im_start|>a<|im_end|>  b"), "32000 263 32001 289 2")
    t.ok(tok:is_special(32001) and not tok:is_special(32000))
    t.eq(joined(lc.tokenizer(dir, {add_bos = true, add_eos = false}):encode "a"), "1 263")
    files.write_json(dir .. "/added_tokens.json", {["<|im_start|>"] = 32007})
    t.errors(function() lc.tokenizer(dir) end, "should have id 32001, but gets 32000")
  end)
  t.test("cut and wrong files", function()
    local path = os.tmpname()
    files.write(path, files.read(llama2):sub(1, 4000))
    t.errors(function() lc.tokenizer(path) end, "byte %d+: expected")
    files.write(path, files.read(llama2):sub(1, 4000) .. ("\255"):rep(100))
    t.errors(function() lc.tokenizer(path) end, path:gsub("%p", "%%%0"))
    files.write(path, "nothing of the kind")
    t.errors(function() lc.tokenizer(path) end, "neither a tokenizer.json nor")
    os.remove(path)
    t.errors(function() lc.tokenizer(llama2, {style = "other"}) end, "neither 'hf' nor 'sentencepiece'")
    t.errors(function() lc.tokenizer(llama2, {styl = "hf"}) end, "no option 'styl'")
    t.errors(function() lc.tokenizer(mistral_json, {style = "sentencepiece"}) end, "is for a SentencePiece")
  end)
else
  t.skip("SentencePiece models", "no test data")
end

if llama3 and llama3_json then
  t.test("a tiktoken file has the ids of the tokenizer.json", function()
    local model, json = lc.tokenizer(llama3), lc.tokenizer(llama3_json)
    t.eq(model.size, json.size)
    for _, text in ipairs(TEXTS) do t.eq(plain(model, text), plain(json, text), text) end
    local text = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    t.eq(joined(model:encode(text)), "128000 " .. joined(json:encode(text)))
    t.eq(model:token(128255), json:token(128255))
    t.eq(joined(lc.tokenizer(llama3, {add_bos = false}):encode "a"), "64")
  end)
  t.test("Llama 3.1's names, where Meta's params.json stands beside", function()
    local dir = folder "llama31"
    copy(llama3, dir .. "/tokenizer.model")
    files.write_json(dir .. "/params.json", {use_scaled_rope = true, vocab_size = 128256})
    local tok = lc.tokenizer(dir)
    t.eq(tok.size, 128256)
    t.eq(tok:id "<|eom_id|>", 128008)
    t.eq(tok:id "<|reserved_special_token_2|>", 128005)
    t.eq(tok:token(128255), "<|reserved_special_token_247|>")
    t.eq(joined(tok:encode "<|python_tag|>a"), "128000 128010 64")
  end)
  t.test("big vocabularies load quickly", function()
    local seconds = math.huge
    for _ = 1, 3 do
      local t0 = lc.now()
      lc.tokenizer(llama3_json)
      seconds = math.min(seconds, lc.now() - t0)
    end
    t.ok(seconds < 3, ("%.2f s"):format(seconds)) -- 0.14 on an idle machine; this is for what would be ten times slower
  end)
else
  t.skip("tiktoken", "no test data")
end

if smollm2 and llama2 then
  t.test("a long text in one piece and any bytes", function()
    local text = (("A line of text, 123 and more. 東京\n"):rep(3000))
    for _, path in ipairs {smollm2, llama2} do
      local tok = lc.tokenizer(path)
      local ids = tok:encode(text, {special = false})
      t.ok(tok:decode(ids) == text or tok:decode(ids) == " " .. text, path)
      for _, odd in ipairs {"\255\254", "a\0b", "\226\130", ("\240\159"):rep(50)} do
        t.ok(#tok:decode(tok:encode(odd)) > 0)
      end
    end
  end)
end

t.finish()
