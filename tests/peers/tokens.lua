-- tokens.lua: the cases that tests/peers/tokens.py wrote: texts to ids and ids to texts, exactly.
--   lolcats tests/peers/tokens.lua FOLDER
local lc = require "lolcats"
local files = require "lolcats.files"
local folder = arg and arg[1] or ""
local failed, passed = 0, 0

local function same(a, b)
    if #a ~= #b then return false end
    for i = 1, #a do if a[i] ~= b[i] then return false end end
    return true
end

local function check(name, ok, input, got, want)
    if ok then passed = passed + 1 return end
    failed = failed + 1
    if failed > 20 then return end
    local function show(v) return type(v) == "table" and table.concat(v, " ") or ("%q"):format(v) end
    print(("FAIL  %s on %s\n      got  %s\n      want %s"):format(name, show(input):sub(1, 300), show(got):sub(1, 300),
                                                                  show(want):sub(1, 300)))
end

for _, name in ipairs(files.list(folder)) do
    if name:match "%.case%.json$" then
        local case = files.read_json(folder .. "/" .. name)
        local tok = lc.tokenizer(case.path, case.style ~= "" and { style = case.style } or nil)
        for _, row in ipairs(case.texts) do
            local text = row[1]
            local ids = tok:encode(text, { special = false, parse = case.parse })
            local with = tok:encode(text, { special = true, parse = case.parse })
            check(name .. " ids", same(ids, row[2]), text, ids, row[2])
            check(name .. " ids with special tokens", same(with, row[3]), text, with, row[3])
            for skip = 0, 1 do
                local got = tok:decode(row[3], { skip_special = skip == 1 })
                check(name .. " text", got == row[4 + skip], row[3], got, row[4 + skip])
            end
        end
        for _, row in ipairs(case.ids) do
            for skip = 0, 1 do
                local got = tok:decode(row[1], { skip_special = skip == 1 })
                check(name .. " text of any ids", got == row[2 + skip], row[1], got, row[2 + skip])
            end
        end
    end
end
print(("%d passed, %d failed"):format(passed, failed))
if failed > 0 or passed == 0 then os.exit(1) end
