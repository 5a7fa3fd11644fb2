# Bash completes `python -m tools.NAME FIELD=VALUE`: python -m tools --shell-completion bash fills the names in.
# What is no such line is left to whatever completed it before, as train.py's own completion.
if [[ $(complete -p python 2> /dev/null) != *" _complete_tools "* ]]; then
    _tools_before=$(complete -p python 2> /dev/null | sed -nE 's/.* -F ([^ ]+) .*/\1/p')
fi

_tools_words() {
    case $1 in
        @CASES@
    esac
}

_complete_tools() {
    local words current choices name
    read -ra words <<< "${COMP_LINE:0:COMP_POINT}"
    [[ ${COMP_LINE:0:COMP_POINT} == *[[:space:]] ]] && words+=("")
    current=${words[-1]}
    if [[ ${words[1]} != -m || (${words[2]} != tools && ${#words[@]} -gt 3 && -z $(_tools_words "${words[2]}")) ]]; then
        compopt -o nospace 2> /dev/null
        [[ -n $_tools_before ]] && "$_tools_before" "$@"
        return
    fi
    if [[ ${words[2]} == tools && ${#words[@]} -gt 3 ]]; then
        name=tools.${words[3]}
        [[ ${#words[@]} == 4 ]] && choices=$(printf '%s\n' @NAMES@ | sed -n 's/^tools\.//p')
    else
        name=${words[2]}
        [[ ${#words[@]} == 3 ]] && choices="tools @NAMES@"
    fi
    [[ -n $choices ]] || choices=$(_tools_words "$name")
    COMPREPLY=($(compgen -W "$choices" -- "$current"))
    if [[ ${COMPREPLY[*]} == "$current" && $current == *= ]]; then
        COMPREPLY=()  # the value is open: a file, perhaps
    elif [[ $COMP_WORDBREAKS == *=* && $current == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#*=}")
    fi
    if [[ ${#COMPREPLY[@]} == 0 && $current == *=* && $COMP_WORDBREAKS != *=* ]]; then  # as Hydra's completion leaves it
        mapfile -t COMPREPLY < <(compgen -P "${current%%=*}=" -f -- "${current#*=}")
    fi
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2> /dev/null
    return 0
}

complete -o default -F _complete_tools python python3
