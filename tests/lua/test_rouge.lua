-- ROUGE: scores as the rouge_score package gives them (its values, to twelve digits), sentences, the SCROLLS summary.
local t = dofile((arg and arg[0] or ""):match "^(.*/)" .. "harness.lua")
local rouge = require "lolcats.rouge"

t.test("tokens are runs of ASCII letters and digits", function()
    t.eq(rouge.tokens "It's the U.S. -- e-mail_42 \195\188ber na\195\175ve \226\132\170",
         { "it", "s", "the", "u", "s", "e", "mail", "42", "ber",
         "na", "ve", "k" })
    t.eq(rouge.tokens " \n\t.", {})
end)

-- target, prediction, then precision, recall and F of rouge1, rouge2, rougeL, rougeLsum
local CASES = {
    { "The quick brown fox jumps over the lazy dog.", "The fast brown fox leaps over the dog",
      { 0.75, 0.666666666667, 0.705882352941, 0.285714285714, 0.25, 0.266666666667,
        0.75, 0.666666666667, 0.705882352941, 0.75, 0.666666666667, 0.705882352941 } },
    { "a b c d e f", "f e d c b a",
      { 1, 1, 1, 0, 0, 0,
        0.166666666667, 0.166666666667, 0.166666666667, 0.166666666667, 0.166666666667, 0.166666666667 } },
    { "police killed the gunman\nthe gunman ended it", "the gunman kill police\nit ended the gunman",
      { 0.875, 0.875, 0.875, 0.285714285714, 0.285714285714, 0.285714285714,
        0.5, 0.5, 0.5, 0.5, 0.5, 0.5 } },
    { "", "something",
      { 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0 } },
    { "one", "one",
      { 1, 1, 1, 0, 0, 0,
        1, 1, 1, 1, 1, 1 } },
    { "w1 w2 w3 w4 w5\nw1 w9", "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5",
      { 0.6, 0.857142857143, 0.705882352941, 0.111111111111, 0.166666666667, 0.133333333333,
        0.4, 0.571428571429, 0.470588235294, 0.6, 0.857142857143, 0.705882352941 } },
    { "a a a b", "a a b b b",
      { 0.6, 0.75, 0.666666666667, 0.5, 0.666666666667, 0.571428571429,
        0.6, 0.75, 0.666666666667, 0.6, 0.75, 0.666666666667 } },
    { "x\n\ny z\n", "y\nz x",
      { 1, 1, 1, 0.5, 0.5, 0.5,
        0.666666666667, 0.666666666667, 0.666666666667, 1, 1, 1 } },
}

t.test("scores of the package", function()
    for i, case in ipairs(CASES) do
        local s, k = rouge.score(case[1], case[2]), 0
        for _, kind in ipairs { "rouge1", "rouge2", "rougeL", "rougeLsum" } do
            for _, field in ipairs { "precision", "recall", "fmeasure" } do
                k = k + 1
                t.close({ s[kind][field] }, { case[3][k] }, 1e-11, ("case %d: %s %s"):format(i, kind, field))
            end
        end
    end
end)

t.test("stems, as NLTK's Porter stemmer gives them", function()
    local porter = require "lolcats.porter"
    for word, stem in pairs { caresses = "caress", ponies = "poni", ties = "tie", cats = "cat", feed = "feed", agreed = "agre",
                              plastered = "plaster", motoring = "motor", sing = "sing", hopping = "hop", falling = "fall",
                              filing = "file", happy = "happi", sky = "sky", relational = "relat", conditional = "condit",
                              vietnamization = "vietnam", adjustable = "adjust", hopefulness = "hope", triplicate = "triplic",
                              electricity = "electr", revival = "reviv", adoption = "adopt", controlling = "control",
                              generalizations = "gener", dying = "die", spied = "spi", lied = "lie", geology = "geolog",
                              enjoying = "enjoy", rate = "rate", cease = "ceas", probably = "probabl" } do
        t.eq(porter.stem(word), stem, word)
    end
    t.eq(rouge.score("running dogs", "the dog runs", { stem = true }).rouge1, { precision = 2 / 3, recall = 1, fmeasure = 0.8 })
end)

t.test("sentences", function()
    t.eq(rouge.sentences " A cat. It sat!  Did it? \"Yes.\" said no one. 3 more.",
         "A cat.\nIt sat!\nDid it?\n\"Yes.\" said no one.\n3 more.")
    t.eq(rouge.sentences "Mr. Fox met J. Hare vs. Tortoise.", "Mr. Fox met J. Hare vs. Tortoise.")
    t.eq(rouge.sentences "", "")
end)

t.test("the summary: percent, the best of several references, the geometric mean", function()
    local s = rouge.summary({ "a b c d", "x y" }, { { "q", "a b c d" }, "x z" })
    t.eq(s["rouge/rouge1"], 75)
    t.eq(s["rouge/rouge2"], 50)
    t.eq(s["rouge/rougeL"], 75)
    t.eq(s["rouge/geometric_mean"], 65.5185)
    t.eq(s.num_predicted, 2)
    t.eq(s.mean_prediction_length_characters, 5)
    t.errors(rouge.summary, "2 predictions and 1", { "a", "b" }, { "a" })
end)

t.finish()
