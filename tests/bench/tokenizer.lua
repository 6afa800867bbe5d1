-- tokenizer.lua: MB/s and tokens/s of tokenizing 10 MB of mixed English text on one thread, and how long the tokenizers
-- take to load, beside the Rust package `tokenizers` in the same run where a Python that has it is named.
--   lolcats tests/bench/tokenizer.lua [--python PYTHON] [--json]      (data: LOLCATS_TEST_DATA, default ../shared)
local lc = require "lolcats"
local files = require "lolcats.files"
local args = lc.args { "Time tokenizers.", { "python", "", "a Python that has the package tokenizers" },
                       { "rounds", 3, "rounds; the best counts", min = 1 },
                       { "json", false, "one JSON object on stdout" } }
local root = os.getenv "LOLCATS_TEST_DATA" or "../shared"
local SIZE = 10 * 1000 * 1000

local CASES = {
    { "byte-level BPE, 49k (SmolLM2)", "smollm2/tokenizer.json" },
    { "byte-level BPE, 128k (Llama 3)", "llama3-hf/tokenizer.json" },
    { "SentencePiece style, 32k (Mistral)", "mistral-v1-hf/tokenizer.json" },
    { "tokenizer.model, SentencePiece (Llama 2)", "llama2/tokenizer.model" },
    { "tokenizer.model, tiktoken (Llama 3)", "llama3/tokenizer.model" },
}

local function mixed_text()
    local parts, size = {}, 0
    local sources = { "tinystories_sample_2MB.txt", "wikitext-2-raw.test.nonblank.lf.txt",
                      "alpaca-cleaned/alpaca_data_cleaned.first5000.json" }
    for i, name in ipairs(sources) do sources[i] = files.read(root .. "/assets/datasets/" .. name) end
    while size < SIZE do
        for _, s in ipairs(sources) do
            parts[#parts + 1] = s
            size = size + #s
        end
    end
    local text = table.concat(parts):sub(1, SIZE)
    return (text:gsub("[\192-\255][\128-\191]*$", ""))
end

local function ours(path, text)
    local t0 = lc.now()
    local tok = lc.tokenizer(path)
    local load, best, count = lc.now() - t0, math.huge, 0
    for _ = 1, args.rounds do
        t0 = lc.now()
        count = #tok:encode(text, { special = false })
        best = math.min(best, lc.now() - t0)
    end
    return { load = load, seconds = best, tokens = count }
end

local PEER = [[
import sys, time
from tokenizers import Tokenizer
text = open(sys.argv[2], encoding="utf-8", newline="").read()
t = time.time(); k = Tokenizer.from_file(sys.argv[1]); load = time.time() - t
def timed(f):
    best = 1e9
    for _ in range(int(sys.argv[3])):
        t = time.time(); n = f(); best = min(best, time.time() - t)
    return n, best
n, whole = timed(lambda: len(k.encode(text, add_special_tokens=False).ids))
lines = text.split("\n")
_, split = timed(lambda: sum(len(e.ids) for e in k.encode_batch_fast(lines, add_special_tokens=False)))
print(load, min(whole, split), n)
]]

-- The package gets the better of two ways: the text in one piece, or line by line.
local function theirs(path, text_path)
    if args.python == "" or not path:match "%.json$" then return nil end
    local script = os.tmpname()
    files.write(script, PEER)
    local pipe = io.popen(("TOKENIZERS_PARALLELISM=false RAYON_NUM_THREADS=1 '%s' '%s' '%s' '%s' %d"):format(
        args.python, script, path, text_path, args.rounds))
    local load, seconds, tokens = pipe:read("*n", "*n", "*n")
    pipe:close()
    os.remove(script)
    return load and { load = load, seconds = seconds, tokens = tokens } or nil
end

local text, text_path, results = mixed_text(), os.tmpname(), {}
files.write(text_path, text)
for _, case in ipairs(CASES) do
    local path = root .. "/assets/tokenizers/" .. case[2]
    if files.exists(path) then
        local a, b = ours(path, text), theirs(path, text_path)
        local row = { name = case[1], load_seconds = a.load, mb_per_second = #text / 1e6 / a.seconds,
                      tokens_per_second = a.tokens / a.seconds, same_count = b and b.tokens == a.tokens,
                      tokenizers_load_seconds = b and b.load, tokenizers_mb_per_second = b and #text / 1e6 / b.seconds,
                      ratio = b and b.seconds / a.seconds }
        results[#results + 1] = row
        if not args.json then
            print(("%-42s load %.3f s  %6.1f MB/s  %5.2f M tokens/s%s"):format(row.name, a.load, row.mb_per_second,
                  row.tokens_per_second / 1e6,
                  b and ("   tokenizers: load %.3f s  %.2f MB/s, %s tokens  ratio %.1f"):format(
                  b.load, row.tokenizers_mb_per_second, row.same_count and "as many" or "OTHER", row.ratio) or ""))
        end
    end
end
os.remove(text_path)
if args.json then print(files.to_json(results)) end
