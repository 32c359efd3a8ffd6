// Command ollama_template says what a Modelfile makes of conversations, as Ollama would: it reads the Modelfile by the
// rules of Ollama's parser, merges neighbours of the same role, and executes the template with the values that Ollama
// hands it. A JSON object a line comes in, {"modelfile": ..., "messages": [...]}, and one goes out, {"text": ...,
// "error": ..., "commands": [[name, value], ...]}.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"os"
	"strconv"
	"strings"
	"text/template"
	"time"
)

type message struct {
	Role     string `json:"role"`
	Content  string `json:"content"`
	Thinking string `json:"thinking"`
}

type question struct {
	Modelfile string    `json:"modelfile"`
	Messages  []message `json:"messages"`
}

type answer struct {
	Text     string      `json:"text"`
	Error    string      `json:"error"`
	Commands [][2]string `json:"commands"`
}

// value takes the value that the text begins with, and returns what is left. A value is complete at a line break if it
// is not the beginning of a quoted one; what cannot be printed is lost, but for the breaks and blanks in between.
func value(text []rune) (string, []rune, error) {
	var kept strings.Builder
	for i, r := range text {
		if r == '\n' || r == '\r' {
			if found, whole := unquoted(strings.TrimSpace(kept.String())); whole {
				return found, text[i+1:], nil
			}
		}
		if r == '\n' || r == '\r' || r == '\t' || strconv.IsPrint(r) {
			kept.WriteRune(r)
		}
	}
	found, whole := unquoted(strings.TrimSpace(kept.String()))
	if !whole {
		return "", nil, errors.New("the file ends within quotes")
	}
	return found, nil, nil
}

func unquoted(text string) (string, bool) {
	for _, quote := range []string{`"""`, `"`} {
		if strings.HasPrefix(text, quote) {
			whole := len(text) >= 2*len(quote) && strings.HasSuffix(text, quote)
			if !whole {
				return "", false
			}
			return text[len(quote) : len(text)-len(quote)], true
		}
	}
	return text, true
}

func word(text []rune) (string, []rune) {
	for i, r := range text {
		if r == ' ' || r == '\t' {
			return string(text[:i]), text[i+1:]
		}
	}
	return string(text), nil
}

func commands(file string) ([][2]string, error) {
	var found [][2]string
	for text := []rune(file); len(text) > 0; {
		if strings.ContainsRune(" \t\r\n", text[0]) {
			text = text[1:]
			continue
		}
		var name, what string
		var err error
		name, text = word(text)
		switch name {
		case "FROM", "TEMPLATE", "SYSTEM":
		case "PARAMETER":
			name, text = word(text)
		default:
			return nil, errors.New("no such command: " + name)
		}
		if what, text, err = value(text); err != nil {
			return nil, err
		}
		found = append(found, [2]string{name, what})
	}
	return found, nil
}

var functions = template.FuncMap{
	"json": func(v any) string {
		text, _ := json.Marshal(v)
		return string(text)
	},
	"currentDate":      func(...string) string { return time.Now().Format("2006-01-02") },
	"yesterdayDate":    func(...string) string { return time.Now().AddDate(0, 0, -1).Format("2006-01-02") },
	"toTypeScriptType": func(any) string { return "any" },
}

func reply(asked question) (told answer) {
	told.Commands = [][2]string{}
	read, err := commands(asked.Modelfile)
	if err != nil {
		told.Error = err.Error()
		return
	}
	told.Commands = read
	given := map[string]string{}
	for _, command := range read {
		given[command[0]] = command[1]
	}
	messages := asked.Messages
	if given["SYSTEM"] != "" && messages[0].Role != "system" {
		messages = append([]message{{Role: "system", Content: given["SYSTEM"]}}, messages...)
	}
	var system []string
	var merged []*message
	for i := range messages {
		one := &messages[i]
		if one.Role == "system" {
			system = append(system, one.Content)
		}
		if n := len(merged); n > 0 && merged[n-1].Role == one.Role && one.Role != "tool" {
			merged[n-1].Content += "\n\n" + one.Content
			continue
		}
		merged = append(merged, one)
	}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(given["TEMPLATE"])
	if err != nil {
		told.Error = err.Error()
		return
	}
	var text strings.Builder
	err = parsed.Execute(&text, map[string]any{
		"System":     strings.Join(system, "\n\n"),
		"Messages":   merged,
		"Tools":      []any(nil),
		"Response":   "",
		"Think":      false,
		"ThinkLevel": "",
		"IsThinkSet": false,
	})
	if err != nil {
		told.Error = err.Error()
	}
	told.Text = text.String()
	return
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<26)
	out := json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	for lines.Scan() {
		var asked question
		if err := json.Unmarshal(lines.Bytes(), &asked); err != nil {
			panic(err)
		}
		if err := out.Encode(reply(asked)); err != nil {
			panic(err)
		}
	}
}
