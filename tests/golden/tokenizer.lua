-- tokenizer.lua: texts to ids and ids to texts, exactly. A case's `library` says how a tokenizer.model is run: as
-- Hugging Face's tools would, or as SentencePiece or tiktoken do, which take special-token text for plain text.
local lc = require "lolcats"
local files = require "lolcats.files"

local function joined(ids) return table.concat(ids, " ") end

local function encode_cases(c, tok, cases)
    for i, e in ipairs(cases) do
        local label = ("text %d (%q) "):format(i - 1, #e.text > 40 and e.text:sub(1, 40) .. "..." or e.text)
        local ids = tok:encode(e.text, { special = false, parse = true })
        c.check(label .. "ids", joined(ids) == joined(e.ids), joined(ids))
        if e.ids_special then
            local with = tok:encode(e.text, { special = true, parse = true })
            c.check(label .. "ids with special tokens", joined(with) == joined(e.ids_special), joined(with))
            if e.decoded then
                local text = tok:decode(e.ids_special, { skip_special = false })
                c.check(label .. "decoded", text == e.decoded, ("%q"):format(text))
            end
            if e.decoded_skip then
                local text = tok:decode(e.ids_special, { skip_special = true })
                c.check(label .. "decoded without special tokens", text == e.decoded_skip, ("%q"):format(text))
            end
        end
    end
end

-- SentencePiece puts out no control tokens; ids_special are the same with BOS in front. tiktoken's are with
-- special-token text recognized, and its texts are those without BOS.
local function plain_cases(c, tok, cases, tiktoken)
    for i, e in ipairs(cases) do
        local label = ("text %d (%q) "):format(i - 1, #e.text > 40 and e.text:sub(1, 40) .. "..." or e.text)
        local ids = tok:encode(e.text, { special = false, parse = false })
        c.check(label .. "ids", joined(ids) == joined(e.ids), joined(ids))
        for n, piece in ipairs(e.pieces or {}) do
            c.check(label .. "piece", ids[n] and tok:token(ids[n]) == piece, ("%q"):format(piece))
        end
        local with = tok:encode(e.text, { special = true, parse = tiktoken })
        c.check(label .. "ids with special tokens", joined(with) == joined(e.ids_special), joined(with))
        local text = tok:decode(tiktoken and { unpack(with, 2) } or ids)
        c.check(label .. "decoded", text == e.decoded, ("%q"):format(text))
    end
end

local function decode_cases(c, tok, cases)
    for i, e in ipairs(cases) do
        local text = tok:decode(e.ids, { skip_special = false })
        c.check(("ids %d decoded"):format(i - 1), text == e.decoded, ("%q, expected %q"):format(text, e.decoded))
    end
end

return function(dir, T)
    for _, file in ipairs(files.list(dir)) do
        if file:match "%.json$" and file ~= "index.json" then
            T.case("tokenizer/" .. file, function(c)
                local json = files.read_json(dir .. "/" .. file)
                local path = json.tokenizer and T.data(json.tokenizer)
                if not path then c.skip("its tokenizer is not here") end
                local peer = json["library"]:match "^%a+" -- the package that made the case
                local tok = lc.tokenizer(path, { style = peer == "sentencepiece" and peer or nil })
                if file:match "%.decode%.json$" then
                    decode_cases(c, tok, json.cases)
                elseif peer == "tokenizers" then
                    encode_cases(c, tok, json.cases)
                else
                    plain_cases(c, tok, json.cases, peer == "tiktoken")
                end
            end)
        end
    end
end
