-- chat_template.lua: message lists through a model's own chat template, and the ids of the result. Exact.
local lc = require "lolcats"
local files = require "lolcats.files"

return function(dir, T)
    local template = require "lolcats.chat_template"
    for _, file in ipairs(files.list(dir)) do
        if file:match "%.json$" and file ~= "index.json" then
            local json = files.read_json(dir .. "/" .. file)
            local path = json.tokenizer and T.data(json.tokenizer)
            local compiled = template.compile(json.template)
            local tok = path and path:match "%.json$" and lc.tokenizer(path)
            for _, e in ipairs(json.cases) do
                T.case(("chat_template/%s %s"):format(file, e.name), function(c)
                    for key, generation in pairs { plain = false, generation = true } do
                        local text = compiled:render({ messages = e.messages, add_generation_prompt = generation,
                            bos_token = json.bos_token, eos_token = json.eos_token })
                        c.check(key, text == e[key], ("%q"):format(text))
                        local want = e["ids_" .. key]
                        if tok and want then
                            local ids = tok:encode(text, { special = false, parse = true })
                            c.check("ids of " .. key, table.concat(ids, " ") == table.concat(want, " "), table.concat(ids, " "))
                        end
                    end
                end)
            end
        end
    end
end
