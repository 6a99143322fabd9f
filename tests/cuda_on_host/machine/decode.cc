#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <map>
#include <sstream>
#include <stdexcept>

#include "code.h"

namespace cuda_on_host::machine {
namespace {

using std::string;

bool Starts(const string& text, const char* with) { return text.rfind(with, 0) == 0; }

string Trim(const string& text) {
  const size_t begin = text.find_first_not_of(" \t"), end = text.find_last_not_of(" \t;");
  return begin == string::npos || end == string::npos ? "" : text.substr(begin, end - begin + 1);
}

// A register or predicate by its name, or kNone.
Operand Named(string name) {
  name = name.substr(0, name.find('.'));  // R4.reuse, R2.64, R7.H0_H0
  Operand found;
  const auto is = [&](const char* prefix, Operand::Kind kind, int nobody, const char* none) {
    const string digits = Starts(name, prefix) ? name.substr(string(prefix).size()) : "";
    if (name != none && (digits.empty() || !std::ranges::all_of(digits, isdigit))) return false;
    found.kind = kind;
    found.index = static_cast<int16_t>(name == none ? nobody : std::stoi(digits));
    return true;
  };
  is("R", Operand::kRegister, kNoRegister, "RZ") ||
      is("UR", Operand::kUniform, kNoUniform, "URZ") || is("P", Operand::kPredicate, kTrue, "PT") ||
      is("UP", Operand::kUniformPredicate, kTrue, "UPT");
  return found;
}

uint32_t Hexadecimal(const string& text) {
  return static_cast<uint32_t>(std::strtoll(text.c_str(), nullptr, 16));
}

// The sum in the last brackets: [R2.64+0x10], [R1+UR4+-0x8], [RZ].
Operand Address(const string& text) {
  const size_t begin = text.rfind('[') + 1;
  std::istringstream parts(text.substr(begin, text.rfind(']') - begin));
  Operand address;
  address.kind = Operand::kRegister;
  address.index = kNoRegister;
  for (string part; std::getline(parts, part, '+');) {
    const Operand named = Named(part);
    if (named.kind == Operand::kRegister) {
      address.index = named.index;
    } else if (named.kind == Operand::kUniform) {
      address.uniform = named.index;
    } else {
      address.bits += Hexadecimal(part);
    }
  }
  return address;
}

Operand Parse(string text) {
  if (text.find('[') != string::npos) return Address(text);
  Operand operand;
  if (text.find("0x") != string::npos) {
    operand.kind = Operand::kNumber;
    operand.bits = Hexadecimal(text);
    return operand;
  }
  bool negative = false, inverted = false, absolute = false;
  for (; !text.empty() && string("-~!|").find(text[0]) != string::npos; text.erase(0, 1)) {
    negative |= text[0] == '-';
    inverted |= text[0] == '~' || text[0] == '!';
    absolute |= text[0] == '|';
  }
  operand = Named(text);
  if (operand.kind == Operand::kNone) {
    operand.kind = Operand::kNumber;
    std::erase(text, 'Q');  // +QNAN
    char* end = nullptr;
    operand.number = std::strtof(text.c_str(), &end);
    if (end == text.c_str()) {
      operand.kind = Operand::kNone;  // a special register, a barrier
    } else if (negative) {
      operand.number = -operand.number;
    }
    static_assert(sizeof(float) == sizeof(uint32_t));
    operand.bits = __builtin_bit_cast(uint32_t, operand.number);
    return operand;
  }
  operand.negative = negative;
  operand.inverted = inverted;
  operand.absolute = absolute;
  return operand;
}

// Results come first: one or two predicates, a register, predicates of what it carries.
void Assign(Instruction& i, const std::vector<Operand>& operands) {
  static const char* kNoResult[] = {"BRA", "EXIT", "ST",  "STG",  "STS",   "RED",  "RET",
                                    "BAR", "CALL", "R2P", "BSSY", "BSYNC", "BREAK"};
  static const char* kPredicates[] = {"ISETP", "FSETP", "UISETP", "PLOP3"};
  const string name = i.opcode.substr(0, i.opcode.find('.'));
  const auto one_of = [&](const auto& names) {
    return std::ranges::any_of(names, [&](const char* each) { return name == each; });
  };
  size_t at = 0;
  int predicates = 0;
  const auto take = [&](int most) {
    while (predicates < most && at < operands.size() && operands[at].predicate()) {
      i.to_predicate[predicates++] = operands[at++];
    }
  };
  if (one_of(kPredicates)) {
    take(2);
  } else if (name == "FCHK") {
    take(1);
  } else if (name == "VOTE" || name == "VOTEU") {
    if (!operands[0].predicate()) i.to = operands[at++];
    take(1);
  } else if (name != "REDG" && !one_of(kNoResult)) {
    take(1);
    if (at < operands.size()) i.to = operands[at++];
    take(2);
  }
  for (; at < operands.size() && i.inputs < 6; ++at) i.from[i.inputs++] = operands[at];
}

}  // namespace

bool Instruction::Has(const char* modifier) const {
  const string all = opcode + ".";
  return all.find(string(modifier) + ".") != string::npos;
}

Code Decode(const string& text) {
  Code code;
  std::map<string, int> labels;
  std::vector<string> targets;
  std::istringstream lines(text);
  for (string line; std::getline(lines, line);) {
    const size_t comment = line.find("/*"), end = line.find("*/");
    const bool instruction = comment != string::npos && line.find_first_not_of(" \t") == comment;
    if (!instruction) {
      if (!line.empty() && line.back() == ':') {
        labels[line.substr(0, line.size() - 1)] = static_cast<int>(code.instructions.size());
      }
      continue;
    }
    Instruction i;
    string rest = Trim(line.substr(end + 2));
    if (!rest.empty() && rest[0] == '@') {
      i.guard = Parse(rest.substr(1, rest.find(' ') - 1));
      rest = Trim(rest.substr(rest.find(' ')));
    }
    i.opcode = rest.substr(0, rest.find(' '));
    rest = rest.size() > i.opcode.size() ? Trim(rest.substr(i.opcode.size())) : "";
    string target;
    if (const size_t quote = rest.find("`("); quote != string::npos) {
      target = rest.substr(quote + 2, rest.find(')', quote) - quote - 2);
      rest = Trim(rest.substr(0, quote));
      if (!rest.empty() && rest.back() == ',') rest.pop_back();
    }
    std::vector<Operand> operands;
    std::istringstream parts(rest);
    for (string part; std::getline(parts, part, ',');) {
      part = Trim(part);
      if (part.size() == 2 && part[0] == 'B' && isdigit(part[1])) i.meeting = part[1] - '0';
      if (part.empty() || part == "PR" || Starts(part, "B")) continue;
      if (Starts(part, "SR")) i.opcode += "." + part;
      operands.push_back(Parse(part));
    }
    Assign(i, operands);
    Bind(i);
    code.instructions.push_back(i);
    targets.push_back(target);
  }
  for (size_t at = 0; at < targets.size(); ++at) {
    const auto found = labels.find(targets[at]);
    if (found != labels.end()) code.instructions[at].target = found->second;
  }
  return code;
}

}  // namespace cuda_on_host::machine
